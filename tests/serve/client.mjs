// A scripted conversation of OpenAI's Node client, unchanged; says what it saw as JSON.
import { createRequire } from "node:module";

const [, , modules, baseURL] = process.argv;
const { default: OpenAI } = createRequire(`${modules}/x.js`)("openai");
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "once" }];
const asked = { model: "tiny", messages, max_tokens: 9, temperature: 0 };
const seen = {};

seen.models = (await client.models.list()).data.map((model) => model.id);
const whole = await client.chat.completions.create({ ...asked, logprobs: true, top_logprobs: 2 });
seen.text = whole.choices[0].message.content;
seen.tokens = whole.usage.completion_tokens;
seen.logprobs = whole.choices[0].logprobs.content.map((token) => token.top_logprobs.length);
seen.streamed = "";
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true, stream_options: { include_usage: true } })) {
  seen.streamed += chunk.choices[0]?.delta.content ?? "";
  if (chunk.usage) seen.usage = chunk.usage.completion_tokens;
}
const helper = client.chat.completions.stream(asked);
seen.helped = (await helper.finalChatCompletion()).choices[0].message.content;
seen.completion = (await client.completions.create({ model: "tiny", prompt: "once", max_tokens: 4 })).choices.length;
const response = await client.responses.create({ model: "tiny", input: "once", max_output_tokens: 9, temperature: 0 });
seen.response = response.output_text;
const tool = { type: "function", function: { name: "go", parameters: { type: "object", properties: { to: { enum: ["a", "b"] } }, required: ["to"], additionalProperties: false } } };
const called = await client.chat.completions.create({ ...asked, model: "tags", tools: [tool], tool_choice: "required", max_tokens: 300 });
seen.call = JSON.parse(called.choices[0].message.tool_calls[0].function.arguments);
const schema = { name: "yes", schema: { enum: ["yes", "no"] } };
const formed = await client.chat.completions.create({ ...asked, max_tokens: 300, response_format: { type: "json_schema", json_schema: schema } });
seen.formed = JSON.parse(formed.choices[0].message.content);
seen.vector = (await client.embeddings.create({ model: "vectors", input: ["a cat"] })).data[0].embedding;
seen.error = await client.chat.completions.create({ ...asked, n: 99 }).catch((error) => [error.status, error.param]);
seen.aborted = await (async () => {
  const stream = await client.chat.completions.create({ ...asked, max_tokens: 30000, stream: true });
  for await (const _ of stream) break;
  return stream.controller.signal.aborted;
})();
console.log(JSON.stringify(seen));

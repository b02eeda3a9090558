"""What is asked of a model that writes, as ids: texts, conversations, and the images in them."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor

from polyhead.errors import ConfigError
from polyhead.generate.intake import prompt_ids
from polyhead.generate.prompts import encode_chat, encode_prompt
from polyhead.images import Processor
from polyhead.models.model import TaskModel
from polyhead.text.tokenizer import Tokenizer
from polyhead.text.tool_calls import ToolFormat, tool_format


class Prompts:
    """The prompts of a job, and the pixels of its images `[N, C, height, width]`, if any.

    Errors: ConfigError for a conversation without a template, and for images to a model that reads
    none.
    """

    def __init__(
        self, model: TaskModel, tokenizer: Tokenizer, processor: Processor | None = None
    ) -> None:
        self.model, self.tokenizer, self.processor = model, tokenizer, processor
        self.vocab_size: int = getattr(model.config, "vocab_size")  # noqa: B009

    def __call__(self, given: Mapping[str, Any]) -> tuple[list[list[int]], Tensor | None]:
        """given: prompts, or messages, tools and images."""
        if "messages" not in given:
            prompts = given["prompts"]
            return [encode_prompt(one, self.tokenizer, self.vocab_size) for one in prompts], None
        if self.tokenizer.chat_template is None:
            raise ConfigError("this model has no chat template; use /v1/completions")
        images: Sequence[bytes] = given.get("images", ())
        if images and self.processor is None:
            raise ConfigError("this model reads no images; send text alone")
        messages = [self._message(message) for message in given["messages"]]
        ids = encode_chat(messages, self.tokenizer, given.get("tools"))
        if musts := given.get("musts"):
            begun = self.calls(given["tools"]).begun(musts)
            ids += self.tokenizer.encode(begun, add_special_tokens=False)
        if not images or self.processor is None:
            return [ids], None
        pixels = self.processor(list(images)).to(self.model.device, self.model.dtype)
        return [prompt_ids(self.model, self.tokenizer, ids, with_images=True)], pixels

    def calls(self, tools: Sequence[Mapping[str, Any]]) -> ToolFormat:
        """How tools are called. Errors: ConfigError where the template says nothing of them."""
        form = self._form
        if form is None:
            raise ConfigError(
                f"the model's chat template writes no calls of tools in JSON, and {len(tools)} "
                "tools were sent; leave them out"
            )
        return form

    @cached_property
    def _form(self) -> ToolFormat | None:
        return tool_format(self.tokenizer)

    def _message(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """As the template reads it: in parts, if it looks for those, or as one text."""
        content = message["content"]
        if self.processor is None:
            return message
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if "type" in (self.tokenizer.chat_template or ""):
            return {**message, "content": parts}
        image_id = int(getattr(self.model.config, "image_token_id"))  # noqa: B009
        shown = self.tokenizer.decode([image_id], skip_special_tokens=False) + "\n"
        texts = [shown if part["type"] == "image" else part["text"] for part in parts]
        return {**message, "content": "".join(texts)}

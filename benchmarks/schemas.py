"""Random JSON schemas: what is written by one is valid by it (figure 11 of docs/reliability.md).

A tiny untaught model draws at temperature 1, many rows at once, each by a schema of its own. Every
text that ends is read as JSON and validated by `jsonschema`. Exit code 1 where one is not valid, or
a schema is refused that should not be.

    python -m benchmarks.schemas                    500 schemas
    python -m benchmarks.schemas --count 10000 --json
"""

import argparse
import json
import random
import sys
import time
from typing import Any

import jsonschema
import torch

import polyhead as ph
from polyhead.errors import ConfigError
from polyhead.generate.sampling.sampler import Sampler

ROWS = 32
MOST = 400
LETTERS = "abcdefghijklmnopqrstuvwxyz_é "


def schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema of the kinds that people ask for: objects, arrays, numbers, texts, choices."""
    makers = [_integer, _number, _string, _pattern, _enum, _const, _plain]
    if depth:
        makers += [_object, _object, _array, _tuple, _any_of, _reference]
    return rng.choice(makers)(rng, depth)


def _word(rng: random.Random, most: int = 6) -> str:
    return "".join(rng.choices(LETTERS, k=rng.randint(1, most)))


def _integer(rng: random.Random, _: int) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "integer"}
    low = rng.randint(-1000, 1000)
    if rng.random() < 0.5:
        found[rng.choice(["minimum", "exclusiveMinimum"])] = low
    if rng.random() < 0.5:
        found[rng.choice(["maximum", "exclusiveMaximum"])] = low + rng.randint(3, 5000)
    if len(found) == 1 and rng.random() < 0.3:
        found["multipleOf"] = rng.randint(1, 12)
    return found


def _number(rng: random.Random, _: int) -> dict[str, Any]:
    low = round(rng.uniform(-50, 50), 2)
    return rng.choice(
        [{"type": "number"}, {"type": "number", "minimum": low, "maximum": low + rng.randint(1, 9)}]
    )


def _string(rng: random.Random, _: int) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "string"}
    if rng.random() < 0.6:
        found["minLength"] = rng.randint(0, 6)
    if rng.random() < 0.8:
        found["maxLength"] = found.get("minLength", 0) + rng.randint(0, 12)
    return found


def _pattern(rng: random.Random, _: int) -> dict[str, Any]:
    formats = ["date", "time", "date-time", "uuid", "ipv4", "email"]
    patterns = [
        "^[a-z]{2,5}$",
        "^(yes|no)[0-9]?$",
        r"^\d{3}-\d{2}$",
        "^[A-Z][a-z]*( [A-Z][a-z]*)?$",
    ]
    if rng.random() < 0.4:
        return {"type": "string", "format": rng.choice(formats)}
    return {"type": "string", "pattern": rng.choice(patterns)}


def _enum(rng: random.Random, _: int) -> dict[str, Any]:
    values = [_word(rng), rng.randint(-9, 9), None, True, 1.5, [1, "a"], {"k": False}]
    return {"enum": rng.sample(values, rng.randint(1, 4))}


def _const(rng: random.Random, _: int) -> dict[str, Any]:
    return {"const": rng.choice([_word(rng, 12), 0, -7, None, {"a": [1, 2]}])}


def _plain(rng: random.Random, _: int) -> dict[str, Any]:
    kinds = ["boolean", "null", "integer", "string"]
    return {"type": rng.choice([*kinds, rng.sample(kinds, 2)])}


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = [_word(rng) for _ in range(rng.randint(0, 5))]
    found: dict[str, Any] = {
        "type": "object",
        "properties": {name: schema(rng, depth - 1) for name in names},
    }
    if names and rng.random() < 0.7:
        found["required"] = rng.sample(list(found["properties"]), rng.randint(0, len(set(names))))
    if rng.random() < 0.8:
        found["additionalProperties"] = rng.choice([False, False, schema(rng, 0)])
    return found


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "array", "items": schema(rng, depth - 1)}
    if rng.random() < 0.6:
        found["minItems"] = rng.randint(0, 3)
    if rng.random() < 0.7:
        found["maxItems"] = found.get("minItems", 0) + rng.randint(0, 3)
    return found


def _tuple(rng: random.Random, depth: int) -> dict[str, Any]:
    items = [schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}


def _any_of(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}


def _reference(rng: random.Random, depth: int) -> dict[str, Any]:
    """A tree: each node may hold more of its kind."""
    node = {
        "type": "object",
        "properties": {
            "value": schema(rng, 0),
            "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
        },
        "required": ["value"],
        "additionalProperties": False,
    }
    return {"$defs": {"node": node}, "$ref": "#/$defs/node"} if depth == 3 else schema(rng, 0)


class Writer:
    """A tiny model and a tokenizer that knows fewer tokens than its head has."""

    def __init__(self) -> None:
        text = json.dumps([schema(random.Random(i)) for i in range(60)], ensure_ascii=False)
        self.tokenizer = ph.Tokenizer.train([text, LETTERS, "0123456789-+.eE"], vocab_size=384)
        torch.manual_seed(0)
        shape = dict(d_model=32, d_ff=64, num_layers=2, num_heads=4, max_seq_len=MOST + 8)
        self.model = ph.build("llama", vocab_size=400, **shape).eval()
        # Untaught odds are even: a text of 400 kinds of tokens would hardly ever close its quotes.
        close = [i for t, i in self.tokenizer.vocab.items() if t and set(t) <= set('"}]')]
        self.bias = dict.fromkeys((*close, *self.tokenizer.eos_ids), 4.0)

    @torch.inference_mode()
    def write(self, schemas: list[dict[str, Any]], seed: int) -> list[tuple[str | None, str]]:
        """For each schema a text that ended or None, and why it was refused or nothing."""
        sampler = Sampler(len(schemas), MOST + 8, 400, torch.device("cpu"), self.tokenizer)
        slots, refused = {}, {}
        for number, one in enumerate(schemas):
            config = ph.GenerationConfig(
                json_schema=one, max_new_tokens=MOST, logit_bias=self.bias, seed=0
            )
            slots[number] = sampler.open(config, [1], seed + number, self.tokenizer.eos_ids)
        for number, slot in list(slots.items()):
            try:
                while not sampler.ready(slot):
                    time.sleep(0.001)
            except ConfigError as error:
                refused[number] = str(error)
                del slots[number]
        texts = self._decode(sampler, slots) if slots else {}
        return [(texts.get(n), refused.get(n, "")) for n in range(len(schemas))]

    def _decode(self, sampler: Sampler, slots: dict[int, int]) -> dict[int, str]:
        backbone: Any = self.model.backbone
        caches, going = backbone.make_caches(len(slots)), dict(slots)
        ids: dict[int, list[int]] = {number: [] for number in slots}
        texts: dict[int, str] = {}
        last = torch.ones(len(slots), 1, dtype=torch.long)
        for _ in range(MOST):
            head: Any = self.model.head
            logits = head(backbone(last, caches=caches)[:, -1])
            drawn = sampler(logits, list(going.values()), [len(ids[n]) for n in going]).tolist()
            for (number, slot), token in zip(list(going.items()), drawn, strict=True):
                if token < 0:
                    raise RuntimeError(f"nothing could be drawn: {sampler.problem(slot)}")
                if token in self.tokenizer.eos_ids:
                    texts[number] = self.tokenizer.decode(ids[number])
                    continue
                sampler.write(slot, len(ids[number]), [token])
                sampler.accept(slot, [token])
                ids[number].append(token)
            stay = [i for i, number in enumerate(going) if number not in texts]
            if not stay:
                break
            last = torch.tensor([[drawn[i]] for i in stay])
            if len(stay) < len(going):
                caches.select(stay)
                going = {n: slot for n, slot in going.items() if n not in texts}
        return texts


def campaign(count: int, seed: int = 0) -> dict[str, Any]:
    """The record of `count` schemas."""
    began, writer = time.perf_counter(), Writer()
    found: dict[str, Any] = {"schemas": count, "ended": 0, "valid": 0, "refused": 0, "faults": []}
    reasons: dict[str, int] = {}
    for start in range(0, count, ROWS):
        schemas = [
            schema(random.Random(seed * 1_000_003 + i))
            for i in range(start, min(start + ROWS, count))
        ]
        for one, (text, refusal) in zip(schemas, writer.write(schemas, start), strict=True):
            if refusal:
                found["refused"] += 1
                reasons[refusal[:90]] = reasons.get(refusal[:90], 0) + 1
            elif text is not None:
                found["ended"] += 1
                fault = _fault(one, text)
                found["valid"] += not fault
                if fault:
                    found["faults"].append({"schema": one, "text": text, "fault": fault})
        _report(start + len(schemas), count, began)
    return found | {"reasons": reasons, "seconds": round(time.perf_counter() - began, 1)}


def _fault(one: dict[str, Any], text: str) -> str:
    try:
        value = json.loads(text)
        jsonschema.Draft202012Validator(one).validate(value)
    except (ValueError, jsonschema.ValidationError) as error:
        return str(error).splitlines()[0]
    return ""


def _report(done: int, count: int, began: float) -> None:
    left = (time.perf_counter() - began) / done * (count - done)
    print(f"\r{done} of {count}, {left:.0f} s left ", end="", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON record")
    args = parser.parse_args()
    found = campaign(args.count, args.seed)
    print(file=sys.stderr)
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        for name, value in found.items():
            print(f"{name:10} {value}")
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())

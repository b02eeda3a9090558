"""A model that reads: vectors, likeness, classes, tags, fillings and answers, a job at a time."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from queue import SimpleQueue
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from polyhead.errors import ConfigError
from polyhead.models.model import TaskModel
from polyhead.serve.messages import Done, failure
from polyhead.tasks.answer import Answerer
from polyhead.tasks.classify import Classifier
from polyhead.tasks.embed import embed, limit
from polyhead.tasks.fill import Filler
from polyhead.tasks.tag import Tagger
from polyhead.text.tokenizer import Tokenizer

Say = Callable[[Any], None]
Work = Callable[[Mapping[str, Any]], Mapping[str, Any]]


class Reading:
    """An encoder and what its head can do; jobs wait in one line, so that each has all cores.

    flush: sends what was said.
    """

    def __init__(self, model: TaskModel, tokenizer: Tokenizer, flush: Callable[[], None]) -> None:
        self.model, self.tokenizer, self._flush = model, tokenizer, flush
        self._jobs: SimpleQueue[tuple[int, Work, Mapping[str, Any], Say] | None] = SimpleQueue()
        self._wanted: set[int] = set()
        self._thread = threading.Thread(target=self._run, name="polyhead-read", daemon=True)
        self._thread.start()

    def about(self) -> dict[str, Any]:
        """Its kind, its head, and the tokens that it reads."""
        return {
            "kind": "encoder", "head": self.model.head_kind, "max_tokens": limit(self.model),
            "parameters": self.model.num_parameters(),
        }  # fmt: skip

    def do(self, number: int, what: str, given: Mapping[str, Any], say: Say) -> None:
        """Put one of the works below in the line. Errors: ConfigError for one that is none."""
        works: dict[str, Work] = {
            "embed": self._embed, "rerank": self._rerank, "classify": self._classify,
            "tag": self._tag, "fill": self._fill, "answer": self._answer,
            "tokenize": self._tokenize, "detokenize": self._detokenize,
        }  # fmt: skip
        if what not in works:
            raise ConfigError("this model reads and does not write; name one that does")
        self._wanted.add(number)
        self._jobs.put((number, works[what], given, say))

    def cancel(self, number: int) -> None:
        """Leave it out, if its turn has not come."""
        self._wanted.discard(number)

    def close(self) -> None:
        """End after the job at hand."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            number, work, given, say = job
            if number not in self._wanted:
                continue
            self._wanted.discard(number)
            try:
                say(Done(number, work(given)))
            # Whatever a model raises is for the one who asked.
            except Exception as error:
                say(failure(number, error))
            self._flush()

    def _vectors(self, texts: Sequence[str], dimensions: int | None = None) -> Tensor:
        found = embed(self.model, self.tokenizer, list(texts), truncate_dim=dimensions)
        assert isinstance(found, Tensor)
        return found

    def _embed(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        vectors = self._vectors(given["texts"], given["dimensions"])
        return {"vectors": vectors.cpu().numpy(), "tokens": self._count(given["texts"])}

    def _rerank(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """By a head that scores pairs, or else by the cosine of vectors."""
        query, documents = given["query"], given["documents"]
        if self.model.head_kind == "classify":
            pairs = Classifier(self.model, self.tokenizer)([query] * len(documents), documents)
            scores = [float(pair.score) for pair in pairs]
        else:
            vectors = F.normalize(self._vectors([query, *documents]), dim=-1)
            scores = (vectors[1:] @ vectors[0]).tolist()
        return {"scores": scores, "tokens": self._count([query, *documents])}

    def _classify(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        found = Classifier(self.model, self.tokenizer)(given["texts"], given["pairs"])
        told = [
            {"label": one.label, "score": one.score, "scores": dict(one.scores), "cut": one.is_cut}
            for one in found
        ]
        return {"data": told, "tokens": self._count(given["texts"])}

    def _tag(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        found = Tagger(self.model, self.tokenizer)(given["texts"])
        told = [{"entities": [asdict(one) for one in entities]} for entities in found]
        return {"data": told, "tokens": self._count(given["texts"])}

    def _fill(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        found = Filler(self.model, self.tokenizer)(given["texts"], top_k=given["top_k"])
        told = [{"masks": [[asdict(one) for one in mask] for mask in masks]} for masks in found]
        return {"data": told, "tokens": self._count(given["texts"])}

    def _answer(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        asked = given["questions"], given["context"]
        found = Answerer(self.model, self.tokenizer)(*asked, top_k=given["top_k"])
        told = [{"answers": [asdict(one) for one in answers]} for answers in found]
        return {"data": told, "tokens": self._count([*given["questions"], given["context"]])}

    def _tokenize(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        if "messages" in given:
            raise ConfigError("this model does not chat; send a prompt")
        ids = self.tokenizer.encode(given["prompts"][0])
        return {"tokens": ids, "count": len(ids), "max_model_len": limit(self.model)}

    def _detokenize(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"prompt": self.tokenizer.decode(given["tokens"], skip_special_tokens=False)}

    def _count(self, texts: Sequence[str]) -> int:
        most = limit(self.model)
        lengths = [len(row) for row in self.tokenizer.encode_batch(list(texts))]
        return sum(length if most is None else min(length, most) for length in lengths)

"""A model that reads: vectors, likeness, classes, tags, fillings and answers, a job at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from polyhead.errors import ConfigError
from polyhead.models.model import TaskModel
from polyhead.serve.explaining import explained
from polyhead.serve.line import Line, Work
from polyhead.tasks.answer import Answerer
from polyhead.tasks.classify import Classification, Classifier
from polyhead.tasks.embed import embed, limit
from polyhead.tasks.fill import Filler
from polyhead.tasks.tag import Tagger
from polyhead.text.tokenizer import Tokenizer


class Reading(Line):
    """An encoder and what its head can do."""

    is_not = "this model reads and does not write; name one that does"

    def __init__(self, model: TaskModel, tokenizer: Tokenizer, flush: Callable[[], None]) -> None:
        self.model, self.tokenizer = model, tokenizer
        super().__init__(flush)

    def about(self) -> dict[str, Any]:
        """Its kind, its head, and the tokens that it reads."""
        return {
            "kind": "encoder", "head": self.model.head_kind, "max_tokens": limit(self.model),
            "parameters": self.model.num_parameters(),
        }  # fmt: skip

    def works(self) -> Mapping[str, Work]:
        """What it does, by name."""
        return {
            "embed": self._embed, "rerank": self._rerank, "classify": self._classify,
            "tag": self._tag, "fill": self._fill, "answer": self._answer,
            "explain": self._explain, "tokenize": self._tokenize, "detokenize": self._detokenize,
        }  # fmt: skip

    def _vectors(self, texts: Sequence[str], dimensions: int | None = None) -> Tensor:
        found = embed(self.model, self.tokenizer, list(texts), truncate_dim=dimensions)
        assert isinstance(found, Tensor)
        return found

    def _embed(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        if given["images"]:
            raise ConfigError("this model reads texts; send input, without images")
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
        if given["images"] or given["labels"]:
            raise ConfigError("this model reads texts; send input, without images and labels")
        found = Classifier(self.model, self.tokenizer)(given["texts"], given["pairs"])
        return {"data": [told_of(one) for one in found], "tokens": self._count(given["texts"])}

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

    def _explain(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        return explained(self.model, self.tokenizer, None, given)

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


def told_of(one: Classification) -> dict[str, Any]:
    """A classification, as it is sent."""
    return {"label": one.label, "score": one.score, "scores": dict(one.scores), "cut": one.is_cut}

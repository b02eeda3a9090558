"""A look inside a model that is served: `/explain`."""

from collections.abc import Callable, Mapping
from typing import Any

from polyhead.images import Processor
from polyhead.models.model import TaskModel
from polyhead.nn.sharing import with_same_weights
from polyhead.serve.line import Line, Work
from polyhead.tasks.inside import inside
from polyhead.text.tokenizer import Tokenizer


def explained(
    model: TaskModel,
    tokenizer: Tokenizer | None,
    processor: Processor | None,
    given: Mapping[str, Any],
) -> Mapping[str, Any]:
    """What every head looks at, as the page's data or the page itself."""
    page = inside(
        model, tokenizer, given["text"], given["second"], given["image"], processor=processor,
        where=given["layers"], title=given["title"], max_tokens=given["max_tokens"],
    )  # fmt: skip
    if given["html"]:
        return {"html": page.html()}
    return {"facts": dict(page.facts), "page": page.data()}


class Explaining(Line):
    """A line of its own for a model whose own thread writes: what is looked at holds its weights,
    and is seen by nobody else."""

    def __init__(
        self,
        model: TaskModel,
        tokenizer: Tokenizer,
        processor: Processor | None,
        flush: Callable[[], None],
    ) -> None:
        self.model, self.tokenizer, self.processor = with_same_weights(model), tokenizer, processor
        super().__init__(flush)

    def works(self) -> Mapping[str, Work]:
        """What it does, by name."""
        return {"explain": lambda given: explained(
            self.model, self.tokenizer, self.processor, given
        )}  # fmt: skip

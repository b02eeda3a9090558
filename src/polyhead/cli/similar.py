"""`polyhead similar`: which texts are like another."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated

import tyro

from polyhead.cli.common import working
from polyhead.cli.texts import lines_of, note_cut, print_json, print_table
from polyhead.errors import DataError
from polyhead.serve.opening import Opening

if TYPE_CHECKING:
    from polyhead.tasks.similar import Match


@dataclass(frozen=True)
class Args:
    """Rank texts by how alike they are to a query: the cosine of their embeddings, 1 the same.

    Texts longer than the model lose their end; a line on standard error says how many did.

    Examples:
      polyhead similar minilm-l6 "how do I return this?" --among help.txt --top-k 3
      polyhead similar minilm-l6 "a cat" "a kitten" "a car" "the sea"
      cat questions.txt | polyhead similar minilm-l6 - --among help.txt --json
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Directory, .gguf file, training run, name (see `polyhead pull`) or owner/name of the hub."""
    texts: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="QUERY TEXT ...")]
    """Queries; without --among, one query and the texts to rank. - reads lines from stdin."""
    among: str | None = None
    """A UTF-8 file with a text on each line, to rank for each query."""
    top_k: int = 5
    """How many texts to show for each query."""
    batch_size: int = 32
    """Texts at once at 24 tokens each; more of shorter ones."""
    json: bool = False
    """One JSON object a query and line: query, matches with text, index, score."""
    opening: Annotated[Opening, tyro.conf.arg(name="")] = field(default_factory=Opening)


def run(args: Args) -> int:
    """Rank and print."""
    queries = lines_of(args.texts, None, "query")
    if args.among is not None:
        texts = lines_of((), args.among)
    else:
        queries, texts = queries[:1], queries[1:]
        if not texts:
            raise DataError("there is nothing to rank; give more texts, or --among FILE")
    given = [*queries, *texts]
    model, tokenizer = args.opening.open(args.model, given)
    from polyhead.tasks.embed import cut_texts, limit
    from polyhead.tasks.similar import Similar

    with working(f"embedding {len(texts)} texts"):
        found = Similar(model, tokenizer, texts, batch_size=args.batch_size)(
            queries, top_k=args.top_k
        )
    _print(queries, found, as_json=args.json)
    note_cut(len(cut_texts(model, tokenizer, given)), len(given), limit(model))
    return 0


def _print(queries: Sequence[str], found: "list[list[Match]]", *, as_json: bool) -> None:
    if as_json:
        print_json(
            {"query": query, "matches": [asdict(one) for one in matches]}
            for query, matches in zip(queries, found, strict=True)
        )
        return
    for query, matches in zip(queries, found, strict=True):
        if len(queries) > 1:
            print(query)
        print_table(("cosine", "line", "text"), [(m.score, m.index + 1, m.text) for m in matches])

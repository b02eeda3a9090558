"""Which texts the next step reads, and how much of each: a policy without tensors."""

from collections import Counter
from collections.abc import Iterable
from typing import cast

from polyhead.generate.memory import Memory
from polyhead.generate.pages import extend_keys
from polyhead.generate.request import Request, Text

_WRITTEN_COST = 2
_REMEMBERED = 64  # clients that are gone


class Scheduler:
    """Requests by priority and, within one, by what their clients have had so far.

    Each step reads a token (and a draft) of every text that decodes, and some tokens of prompts.
    `running` requests hold rows; where blocks are too few, the latest of the least priority gives
    back its own and reads its text again later. A request whose prompt begins like one that is
    being read waits until it can be found.

    Clients share by counted service, a token written costing two (Sheng et al. 2024, section 4).
    """

    def __init__(self, memory: Memory, idle_chunk: int) -> None:
        self.memory, self.idle_chunk = memory, idle_chunk
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.had: Counter[str] = Counter()
        self._going: list[Text] = []

    def add(self, request: Request) -> None:
        """Let a request wait. A client that comes back is owed nothing for its absence."""
        active = {other.client for other in (*self.running, *self.waiting)}
        least = min((self.had[client] for client in active), default=0)
        if request.client not in active:
            self.had[request.client] = max(self.had[request.client], least)
        if len(self.had) > 2 * len(active) + _REMEMBERED:
            # Those who are gone and had no more than others would begin with these anyway.
            self.had = Counter(
                {c: n for c, n in self.had.items() if c in active or (active and n > least)}
            )
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Forget a request, whatever its state; its rows are free at once."""
        for requests in (self.running, self.waiting):
            if request in requests:
                requests.remove(request)
        for text in request.texts:
            self.close(text)

    def close(self, text: Text) -> None:
        """Give back a text's row."""
        if text.row is not None:
            self.memory.close(text.row)
            text.row, text.held, text.draft = None, 0, []

    def hold(self, text: Text, count: int) -> None:
        """Count tokens of a text that were read."""
        if not count:
            return
        assert text.row is not None
        size, before = self.memory.block_size, text.held
        text.held += count
        if text.held // size > before // size and self.memory.finds_prefixes:
            self.memory.remember(text.row, self.keys(text), text.held, before)
        self.memory.leave_behind(text.row, text.held)

    def written(self, request: Request, tokens: int) -> None:
        """Count tokens that were written for a request's client."""
        self.had[request.client] += _WRITTEN_COST * tokens

    @property
    def is_busy(self) -> bool:
        """Whether a text is at work that has read its prompt."""
        return any(text.decodes for request in self.running for text in request.texts)

    def schedule(self, chunk: int) -> list[tuple[Text, int]]:
        """Texts to read now, and how many tokens of each beside its draft; where some go on, up
        to `chunk` tokens of prompts."""
        if self._go_on():
            return [(text, 1) for text in self._going]
        self._make_way()
        plan: list[tuple[Text, int]] = []
        budget = chunk if self.is_busy else self.idle_chunk
        for request in sorted(self.running, key=_order):
            if request in self.running:  # and was not sent back meanwhile
                some = self._pieces(request, budget)
                plan += some
                budget -= num_read(some)
        while budget > 0 and (request := self._admitted()) is not None:
            some = self._pieces(request, budget, is_new=True)
            if not some:
                break  # it was sent back at once: there is less room than it seemed
            plan += some
            budget -= num_read(some)
        goes_on = all(count == 1 and text.written and not text.draft for text, count in plan)
        self._going = [text for text, _ in plan] if goes_on else []
        return plan

    def _go_on(self) -> bool:
        """Whether the texts of the last plan, each of which has written, are all there is to read:
        a token each, for which there is room now."""
        going, memory = self._going, self.memory
        if not going or self.waiting:
            return False
        if going != [text for request in self.running for text in request.texts]:
            return False
        for text in going:
            held, row = text.held, text.row
            if row is None or len(text.ids) - held != 1 or text.draft:
                return False
            # Beams share what they write to.
            if text.request.search is not None:
                return False
            if held % memory.block_size == 0 and not memory.make_room([(row, held, held + 1)]):
                return False
        return True

    def _pieces(
        self, request: Request, budget: int, is_new: bool = False
    ) -> list[tuple[Text, int]]:
        """What to read of a running request. Room is made, if need be at the cost of later ones.

        is_new: at its own cost alone, as the others are in the plan already.
        """
        self._open_texts(request)
        pieces = _wanted(request, budget, self.memory.most_at_once)
        while not self.memory.make_room(_growth(pieces)):
            drafting = [text for text, _ in pieces if text.draft]
            if drafting:
                for text in drafting:
                    text.draft = []
                continue
            victim = request if is_new else max(self.running, key=_order)
            self._send_back(victim)
            if victim is request:
                return []
        self.had[request.client] += num_read(pieces)
        return pieces

    def _send_back(self, request: Request) -> None:
        self.running.remove(request)
        for text in request.texts:
            self.close(text)
        request.times_preempted += 1
        self.waiting.append(request)

    def _make_way(self) -> None:
        """Send back what is less urgent than a waiting request that does not fit beside it."""
        first = min((r for r in self.waiting if r.is_ready), key=self._turn, default=None)
        if first is None:
            return
        while not self._fits(first):
            victim = max(self.running, key=_order, default=None)
            if victim is None or victim.priority >= first.priority:
                return
            self._send_back(victim)

    def _admitted(self) -> Request | None:
        """The next waiting request, running now; None where there is none that fits."""
        being_read = self._being_read()
        ready = [request for request in self.waiting if request.is_ready]
        candidates = sorted(ready, key=self._turn)
        for request in candidates:
            if self._is_near(request, being_read):
                continue
            if not self._fits(request):
                return None
            self.waiting.remove(request)
            self.running.append(request)
            return request
        return None

    def _open_texts(self, request: Request) -> None:
        """Give texts rows, each when those before it hold what it may find there."""
        for text in request.texts:
            if text.row is None:
                self._open(text)
            if not text.decodes:
                return

    def _open(self, text: Text) -> None:
        first = text.request.texts[0]
        if text.request.needs_states and first.row is not None:
            # Candidates differ in their last token alone.
            text.row, text.held = self.memory.fork(first.row), first.held
            return
        text.row = self.memory.open()
        self.memory.open_source(text.row, len(text.request.source), first.row)
        if self.memory.finds_prefixes and not text.request.needs_states:
            text.held = self.memory.adopt(text.row, self.keys(text), self._adoptable(text))
        if not text.written and not text.is_companion:
            text.request.found = text.held

    def _adoptable(self, text: Text) -> int:
        """Tokens that may be found: all but the last, and no image in part."""
        most, is_split = len(text.ids) - 1, True
        while is_split:
            found = self.memory.known(self.keys(text), most)
            split = [begin for begin, end in text.request.images if begin < found < end]
            most, is_split = min([most, *split]), bool(split)
        return most

    def _fits(self, request: Request) -> bool:
        rows = request.rows_wanted
        longest = max(request.texts, key=lambda text: len(text.ids))
        keys = self.keys(longest) if self.memory.finds_prefixes else ()
        # Candidates that a search weighs may be as long as they will ever be.
        length = min(len(longest.ids) + 1, len(longest.prompt) + request.limit)
        # Some will need rows for their copies or beams when they have read their prompts.
        promised = sum(
            other.rows_wanted - sum(text.row is not None for text in other.texts)
            for other in self.running
        )
        return rows <= self.memory.num_free_rows - promised and self.memory.has_room(
            keys, length, rows, len(request.source)
        )

    def _turn(self, request: Request) -> tuple[int, int, int]:
        return -request.priority, self.had[request.client], request.number

    def keys(self, text: Text) -> list[bytes]:
        """Of the full blocks of a text."""
        extend_keys(text.keys, text.ids, self.memory.block_size, text.request.salt)
        return text.keys

    def _being_read(self) -> set[bytes]:
        """Keys of blocks that will be found soon."""
        if not self.memory.finds_prefixes:
            return set()
        size = self.memory.block_size
        return {
            key
            for request in self.running
            for text in request.texts
            if not text.decodes
            for key in text.keys[text.held // size :]
        }

    def _is_near(self, request: Request, being_read: set[bytes]) -> bool:
        if not being_read:
            return False
        keys = self.keys(request.texts[0])
        known = self.memory.known(keys, len(request.texts[0].ids) - 1) // self.memory.block_size
        return known < len(keys) and keys[known] in being_read


def num_read(plan: Iterable[tuple[Text, int]]) -> int:
    """Tokens of prompts that a plan reads, and of the sources that it begins with."""
    return sum(
        (0 if text.held and text.decodes else count)
        + (0 if text.held else len(text.request.source))
        for text, count in plan
    )


def _order(request: Request) -> tuple[int, int]:
    return -request.priority, request.number


def _wanted(request: Request, budget: int, most: int) -> list[tuple[Text, int]]:
    """Texts that decode and, within the budget, parts of those that do not yet.

    The texts of a search go on together, and those that are guided with their companions.
    """
    pieces = [(text, 1) for text in request.texts if text.decodes]
    if len(pieces) == len(request.texts):
        return pieces
    if request.moves_together:
        pieces = []
    reading = [text for text in request.texts if not text.decodes]
    for text in reading:
        if text.row is None:
            break
        # Of several texts, each stops where it decodes.
        count = text.unread - (len(request.texts) > 1)
        if request.pixels is None or text.held >= len(request.prompt):
            count = min(count, budget, most)
        if count > 0 and budget > 0:
            pieces.append((text, count))
            budget -= count
    return pieces


def _growth(pieces: Iterable[tuple[Text, int]]) -> list[tuple[int, int, int]]:
    return [
        (cast(int, text.row), text.held, text.held + count + len(text.draft))
        for text, count in pieces
    ]

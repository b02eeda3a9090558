"""Logits -> transforms -> draw, for rows that come and go, each by its own config.

`N` rows of a call, `V` tokens of the vocabulary.
"""

from collections.abc import Collection, Sequence
from concurrent.futures import Future

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.errors import ConfigError
from polyhead.generate.config import GenerationConfig
from polyhead.generate.sampling import mirostat
from polyhead.generate.sampling.choice import Choice
from polyhead.generate.sampling.draw import Streams
from polyhead.generate.sampling.edits import BreakTable, Edit, edits
from polyhead.generate.sampling.grammar import Grammars
from polyhead.generate.sampling.history import History, Step
from polyhead.generate.sampling.slot import Slot
from polyhead.generate.sampling.walk import Walk
from polyhead.text.tokenizer import Tokenizer


class Sampler:
    """Draws tokens for `max_rows` texts of up to `max_len` tokens, their prompts counted; there is
    room for more where texts that were sent back keep their slots.

    Token number i of a row follows from the logits there, from what stands before it, and from
    the i-th random number of the row's seed alone: not from its batch, nor from how often or in
    which order positions are asked for. (Mirostat's state follows what was accepted.)

    tokenizer: what grammars and DRY's sequence breakers are read by; its vocabulary may be smaller
    than the head's.
    """

    def __init__(
        self,
        max_rows: int,
        max_len: int,
        vocab_size: int,
        device: torch.device,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.vocab_size, self.device = vocab_size, device
        self._tokenizer = tokenizer
        self._slots: list[Slot | None] = [None] * max_rows
        self._history = History(max_rows, max_len, device)
        self._streams = Streams(max_rows, device)
        self._mu = torch.zeros(max_rows, device=device)
        self._surprise = torch.zeros(max_rows, device=device)
        self._grammars: Grammars | None = None
        self._breakers: dict[tuple[str, ...], Tensor] = {}
        self._plan: _Plan | None = None

    def prepare(self, config: GenerationConfig) -> Future[Walk] | None:
        """Look a config over and begin to compile its grammar; the future tells how that went.

        Errors, at once or by the future: ConfigError for a grammar that is refused, at once for a
        token that the head does not have.
        """
        self._check(config)
        if not config.constrained:
            return None
        if self._tokenizer is None:
            raise ConfigError("a grammar needs the model's tokenizer, and there is none")
        if self._grammars is None:
            self._grammars = Grammars(self._tokenizer, self.vocab_size)
        return self._grammars.prepare(config)

    def open(
        self,
        config: GenerationConfig,
        prompt_ids: Sequence[int],
        seed: int,
        ends: Collection[int] = (),
    ) -> int:
        """A slot for a row: its prompt, of one token or more, and the tokens that end it.

        Its grammar, if it has one, is compiled meanwhile: see `ready`. Errors: as `prepare`.
        """
        compiled = self.prepare(config)
        # A tokenizer may know of ends that the head cannot write.
        drawable = tuple(sorted(end for end in ends if end < self.vocab_size))
        slot = Slot(config, tuple(prompt_ids), seed, drawable, compiled=compiled)
        slot.is_plain = not compiled and not edits([slot], self.device, self._break_table)
        number = self._place(slot)
        if slot.needs_history:
            self._history.write(number, 0, slot.prompt)
        self._mu[number] = 2 * config.mirostat_tau
        return number

    def ready(self, slot: int) -> bool:
        """Whether the row can be drawn for without a wait for its grammar.

        Errors: ConfigError for a grammar that is refused.
        """
        compiled = self._row(slot).compiled
        if compiled is not None and not compiled.done():
            return False
        self._wait(slot)
        return True

    def _wait(self, slot: int) -> None:
        row = self._row(slot)
        if row.compiled is not None:
            row.walk = row.compiled.result().fork()
            row.compiled, self._plan = None, None

    def write(self, slot: int, start: int, ids: Sequence[int]) -> None:
        """Tokens `start, start + 1, ...` of the text, certain or not; those after them are gone."""
        row = self._row(slot)
        row.write(start, ids)
        if row.needs_history:
            self._history.write(slot, len(row.prompt) + start, ids)

    def accept(self, slot: int, ids: Sequence[int]) -> None:
        """The next tokens of the text are certain: these, which were written."""
        row = self._row(slot)
        row.accepted += len(ids)
        if row.walk is not None and not set(ids) & set(row.ends):
            row.walk.foresee(row.free(row.accepted))
        if row.config.mirostat and ids:
            tau, eta = row.config.mirostat_tau, row.config.mirostat_eta
            one = slice(slot, slot + 1)
            self._mu[one] = mirostat.follow(self._mu[one], self._surprise[one], tau, eta)

    def __call__(self, logits: Tensor, slots: Sequence[int], written: Sequence[int]) -> Tensor:
        """Ids `[N]` drawn from logits `[N, V]`; -1 where a row's logits are not numbers.

        Row n belongs to `slots[n]` and draws its token number `written[n]`. See `problem` too.
        """
        plan = self._planned(slots)
        choice = plan.choice
        if plan.edits or not choice.is_greedy:
            logits = plan.edited(logits.float(), written, self._history)
        if choice.is_greedy:
            return choice(logits)[0]
        drawing = [slots[n] for n in choice.drawing]
        places = [written[n] for n in choice.drawing]
        uniform = self._streams.at(drawing, places)
        if len(drawing) < len(slots):
            some = torch.tensor(choice.drawing, device=self.device)
            uniform = uniform.new_zeros(len(slots)).index_copy_(0, some, uniform)
        ids, surprises = choice(logits, uniform, self._mu[plan.slots])
        if surprises is not None:
            self._surprise[plan.slots] = surprises
        return ids

    def takes_likeliest(self, slots: Sequence[int]) -> bool:
        """Whether each of these rows draws the token of its largest logit, and asks for nothing
        but that."""
        return self._planned(slots).takes_likeliest

    def constrains(self, slots: Sequence[int]) -> bool:
        """Whether `constrain` changes anything of these."""
        return not all(self._row(slot).is_plain for slot in slots)

    def constrain(self, logprobs: Tensor, slots: Sequence[int], written: Sequence[int]) -> Tensor:
        """Scores `[N, V]` after penalties, bans, masks and forced tokens: what a search goes by."""
        if not self.constrains(slots):
            return logprobs.float()
        return self._planned(slots).edited(logprobs.float(), written, self._history)

    def is_complete(self, slot: int) -> bool:
        """Whether the grammar or the trie allows nothing more after what is written but an end."""
        self._wait(slot)
        row = self._row(slot)
        if row.config.trie is not None:
            return row.config.trie.is_leaf(row.node(len(row.ids)))
        return row.walk is not None and row.walk.is_complete(row.free(len(row.ids)))

    def problem(self, slot: int) -> str:
        """Why a row drew -1, where that is not its logits: a line, or nothing."""
        return self._row(slot).problem

    def fork(self, slot: int, seed: int | None = None) -> int:
        """Another slot with the same text and state, going its own way; None: by the same seed."""
        row = self._row(slot)
        other = self._place(row.fork(row.seed if seed is None else seed))
        if row.needs_history:
            self._history.copy(slot, other)
        if row.config.mirostat:
            self._mu[other], self._surprise[other] = self._mu[slot], self._surprise[slot]
        return other

    def close(self, slot: int) -> None:
        """Give a slot back."""
        self._slots[slot], self._plan = None, None

    def _place(self, row: Slot) -> int:
        if None not in self._slots:
            self._grow()
        number = self._slots.index(None)
        self._slots[number], self._plan = row, None
        self._streams.seed(number, row.seed)
        return number

    def _grow(self) -> None:
        """Twice as many slots."""
        more = len(self._slots)
        self._slots += [None] * more
        self._history.grow(more)
        self._streams.grow(more)
        self._mu, self._surprise = (F.pad(x, (0, more)) for x in (self._mu, self._surprise))

    def _row(self, slot: int) -> Slot:
        row = self._slots[slot]
        assert row is not None, f"slot {slot} is closed"
        return row

    def _planned(self, slots: Sequence[int]) -> "_Plan":
        if self._plan is None or self._plan.key != tuple(slots):
            for slot in slots:
                self._wait(slot)
            rows = [self._row(slot) for slot in slots]
            self._plan = _Plan(tuple(slots), rows, self.device, self._break_table)
        return self._plan

    def _break_table(self, words: tuple[str, ...]) -> Tensor:
        """Which tokens `[V]` hold one of these strings."""
        if words not in self._breakers:
            table = torch.zeros(self.vocab_size, dtype=torch.bool)
            if self._tokenizer is not None:
                texts = self._tokenizer.decode_batch(
                    [[i] for i in range(self._tokenizer.vocab_size)], skip_special_tokens=False
                )
                found = [i for i, text in enumerate(texts) if any(w in text for w in words)]
                table[[i for i in found if i < self.vocab_size]] = True
            self._breakers[words] = table.to(self.device)
        return self._breakers[words]

    def _check(self, config: GenerationConfig) -> None:
        """ConfigError for a token that the head does not have."""
        named = {
            "logit_bias": [token for token, _ in config.logit_bias],
            "sequence_bias": [token for run, _ in config.sequence_bias for token in run],
            "bad_words_ids": [token for word in config.bad_words_ids for token in word],
            "suppress_tokens": config.suppress_tokens,
            "begin_suppress_tokens": config.begin_suppress_tokens,
            "forced_prefix_ids": config.forced_prefix_ids,
            "force_words_ids": [t for e in config.force_words_ids for word in e for t in word],
            "trie": () if config.trie is None else (config.trie.max_token,),
            "forced_bos_token_id": (config.forced_bos_token_id or 0,),
            "forced_eos_token_id": (config.forced_eos_token_id or 0,),
        }
        for name, tokens in named.items():
            if tokens and max(tokens) >= self.vocab_size:
                raise ConfigError(
                    f"{name} names token {max(tokens)}, and the model has {self.vocab_size}; "
                    "use ids of this model's vocabulary"
                )


class _Plan:
    """What the rows of a call need, found once for calls with the same slots."""

    def __init__(
        self, key: tuple[int, ...], rows: list[Slot], device: torch.device, breakers: BreakTable
    ) -> None:
        self.key, self.rows = key, rows
        self.slots = torch.tensor(key, device=device)
        self.edits: list[Edit] = edits(rows, device, breakers)
        configs = [row.config for row in rows]
        self.choice = Choice(configs, device)
        self.takes_likeliest = self.choice.is_greedy and not self.edits
        if any(config.logprobs is not None or config.best_of is not None for config in configs):
            self.takes_likeliest = False

    def edited(self, logits: Tensor, written: Sequence[int], history: History) -> Tensor:
        step = Step(self.rows, self.slots, written, history)
        for edit in self.edits:
            logits = edit(logits, step)
        return logits

"""The class that lm-evaluation-harness knows a model by; see `harness`, which imports it if it can.

Texts are tokenised as the harness tokenises them for a transformers model (`HFLM`), so that scores
can be compared: special tokens that a prompt spells act, since the harness applies the chat
template itself; a prompt that is too long loses its beginning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from workbench.data.examples import Example
from workbench.errors import ConfigError, DataError
from workbench.evaluation.generation import SamplingConfig, check_ids, generate_answers, room
from workbench.evaluation.likelihood import first_token, score_rows
from workbench.models.loading import BaseModel, embedding_rows

MAX_POSITIONS = 2048  # of a model that does not say how many it has; the harness's own default
MAX_ANSWER_TOKENS = 256  # where a task does not say; likewise
KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}
Request = tuple[object, list[int], list[int]]  # (anything, context tokens, continuation tokens)


class HarnessModel(TemplateLM):
    """Answers the harness's three kinds of requests: likelihoods, rolling ones, and texts."""

    def __init__(self, base: BaseModel, batch_size: int):
        super().__init__()
        self.base, self.batch_size, self.tokenizer = base, batch_size, base.tokenizer
        self.max_length = min(room(base), MAX_POSITIONS if room(base) > 10**9 else room(base))

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that a text's first token is conditioned on."""
        return first_token(self.base)

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's cache of requests."""
        return self.base.name.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: object
    ) -> list[int]:
        """Token ids; a text that begins with the begin of text gets no second one."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The chat as the model's template writes it."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], **kwargs: object
    ) -> list[tuple[float, bool]]:
        rows = []
        for number, (_, context, continuation) in enumerate(requests):
            where = f"request {number}"
            if not continuation or len(continuation) > self.max_length:
                raise DataError(
                    f"has {len(continuation)} tokens to score; 1 to {self.max_length} can be",
                    where=where,
                )
            tokens = np.array([*context, *continuation][-(self.max_length + 1) :], dtype=np.int32)
            first = len(tokens) - len(continuation)
            rows.append(Example(tokens, np.arange(len(tokens)) >= first, where))
        scores = score_rows(self.base, rows, self.batch_size)
        answers = [(float(s.log_probs.sum()), bool(s.greedy.all())) for s in scores]
        for (texts, *_), answer in zip(requests, answers):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of each whole text, in windows where it is long."""
        owners, windows = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(
                tokens, self.prefix_token_id, self.max_length, context_len=1
            ):
                owners.append(number)
                windows.append((None, *make_disjoint_window(window)))
        sums = np.zeros(len(requests))
        for owner, (total, _) in zip(owners, self._loglikelihood_tokens(windows)):
            sums[owner] += total
        for request, total in zip(requests, sums.tolist()):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums.tolist()

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Each prompt's continuation, up to one of the task's stop sequences."""
        alike: dict[str, list[int]] = {}  # requests with the same settings are decoded together
        for number, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(number)
        answers: list[str] = [""] * len(requests)
        for numbers in alike.values():
            prompts = [requests[number].args[0] for number in numbers]
            for number, text in zip(numbers, self._continue(prompts, requests[numbers[0]].args[1])):
                answers[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return answers

    def _continue(self, prompts: Sequence[str], settings: Mapping[str, object]) -> list[str]:
        settings = normalize_gen_kwargs(dict(settings), MAX_ANSWER_TOKENS)
        unknown = sorted(settings.keys() - KNOWN)
        if unknown:
            raise ConfigError(
                f"the task asks for {unknown[0]!r} in generation, which is not supported",
                cure=f"Known are: {', '.join(sorted(KNOWN))}.",
            )
        sampling = SamplingConfig(
            max_tokens=settings["max_gen_toks"],
            temperature=settings.get("temperature", 0.0) if settings["do_sample"] else 0.0,
            top_p=settings.get("top_p", 1.0),
        )
        longest = self.max_length - sampling.max_tokens
        if longest < 1:
            raise ConfigError(
                f"{sampling.max_tokens} tokens to generate leave no room for a prompt",
                cure=f"The model has {self.max_length} positions: lower max_gen_toks.",
            )
        encoded = [self.tok_encode(prompt)[-longest:] for prompt in prompts]
        for ids in encoded:
            check_ids(ids, embedding_rows(self.base.model, self.base.config))
        stops = [stop for stop in settings["until"] if stop]

        def cut(ids: list[int]) -> tuple[str, bool]:
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            places = [text.find(stop) for stop in stops if stop in text]
            return (text[: min(places)], True) if places else (text, False)

        answers = generate_answers(
            self.base, encoded, sampling, self.batch_size, is_done=lambda ids: cut(ids)[1]
        )
        return [cut(ids)[0] for ids in answers]

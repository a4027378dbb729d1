"""The engine: requests in, tokens out, one step at a time.

Role-free. What makes a prefill, decode or aggregated replica is which verbs its owner uses:

    add                       generate here, or with `Request.retain` compute the prompt, sample one token and keep
                              the pages until `release`
    reserve, admit            take pages for a prompt whose KV comes from elsewhere, then go on after its next token
    unreserve, abort          the ways back; `abort(quarantine=True)` and `drained` where a write may still land
    step                      schedule, run the model once, sample, and say what happened

One thread calls all of it. The engine reads no clock, opens no socket and starts no thread: equal calls give equal
results. Every request ends exactly once: by a token with a finish reason, by `release`, by `abort`, or in
`StepOutput.failed`.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence

from engine.audit import AuditReport, audit
from engine.config import EngineConfig
from engine.counters import EngineCounters
from engine.generation import Generations
from engine.grammar.constraint import GrammarMismatch
from engine.grammar.masks import MaskFiller
from engine.interfaces import Model, TokenSampler
from engine.kv_manager import KVManager
from engine.kv_spec import KVPool
from engine.limits import check_vocabulary, sequence_limit
from engine.outputs import Failed, StepOutput, TokenOutput
from engine.page_allocator import PageState
from engine.request import Request, RequestStatus
from engine.runner import ModelRunner
from engine.sampling import LogitsError, Sampled
from engine.scheduler import Scheduler
from engine.scoring import PromptLogitsError, max_scored_tokens
from engine.stopping import StopTextFactory
from protocol.rooms import Load

_LOG = logging.getLogger(__name__)


class Engine:
    """One model, one KV pool and the requests on it.

    `config` must fit `pool`, else ValueError. `stop_texts` makes the text that stop strings are looked for in
    (`engine.stopping.stop_texts(tokenizer)`); without it, requests with stop strings are refused. So are those with
    grammars without `masks`, which the caller closes.
    """

    def __init__(
        self,
        *,
        model: Model,
        pool: KVPool,
        config: EngineConfig,
        sampler: TokenSampler,
        stop_texts: StopTextFactory | None = None,
        masks: MaskFiller | None = None,
    ) -> None:
        if (pool.num_pages, pool.spec.page_size) != (config.num_pages, config.page_size):
            raise ValueError(
                f"the KV pool has {pool.num_pages} pages of {pool.spec.page_size} tokens, but the engine is configured "
                f"for {config.num_pages} pages of {config.page_size}; make both from the same EngineConfig"
            )
        self.config = config
        self.pool = pool
        self.max_context = min(model.config.max_position_embeddings, config.num_pages * config.page_size)
        """Tokens a sequence may have, prompt and generated together."""
        self._limits = model.config
        self._generations = Generations(eos_token_ids=model.config.eos_token_ids, stop_texts=stop_texts, masks=masks)
        self._runner = ModelRunner(model=model, pool=pool, sampler=sampler, generations=self._generations)
        self._memory = KVManager(
            num_pages=config.num_pages, page_size=config.page_size, enable_prefix_cache=config.enable_prefix_cache
        )
        self.counters = EngineCounters()
        self._scheduler = Scheduler(
            config=config,
            memory=self._memory,
            counters=self.counters,
            max_scored_tokens=max_scored_tokens(model.config.vocab_size),
        )
        self._requests: dict[Hashable, Request] = {}
        self._registrations = 0
        self._stalled = False
        """Whether nothing could be scheduled the last time, and nothing has changed since."""

    # ---- requests in ----------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Let the request wait for its turn. Raises RequestTooLong, or ValueError for one that cannot be served."""
        self._check(request)
        self._register(request)
        self._scheduler.add(request)

    def reserve(self, request: Request) -> bool:
        """Give the request pages for all of its tokens, whose KV will come from elsewhere; False if it must wait.

        The first `request.num_cached` tokens, whole pages, are there already. Raises as `add` does. After False the
        request is as it was and may be tried again.
        """
        self._check(request)
        if not self._scheduler.reserve(request):
            return False
        self._register(request)
        return True

    def unreserve(self, request: Request) -> None:
        """Take a reservation back, into whose pages no copy is running; the request is as before `reserve`."""
        self._scheduler.unreserve(request)
        self._forget(request)

    def admit(self, request: Request, token: int) -> None:
        """The KV of all of a reserved request's tokens is in its pages, and `token` is what its peer sampled next.

        The token is not reported again. Raises ValueError, and the request can then only be aborted, when the token
        ends the sequence (the peer ends those itself) or the request is not reserved.
        """
        if request.status is not RequestStatus.RECEIVING:
            raise ValueError(f"request {request.key!r} is {request.status.name}; only a RECEIVING one can be admitted")
        if not 0 <= token < self._limits.vocab_size:
            raise ValueError(f"request {request.key!r} was handed over with token {token}, which is in no vocabulary")
        ended = self._generations.check(request, token)
        if ended is not None:
            raise ValueError(f"request {request.key!r} was handed over with token {token}, which ends it ({ended[0]})")
        self._scheduler.admit(request)
        self._generations.append(request, token)

    # ---- requests out ---------------------------------------------------------------------------------------

    def abort(self, key: Hashable, *, quarantine: bool = False) -> bool:
        """End a request in any state; False when there is none of that key.

        With `quarantine` its own pages are out of use until `drained(key)`, because a write may still land there.
        """
        request = self._requests.get(key)
        if request is None:
            return False
        self._scheduler.remove(request)
        if quarantine:
            self._memory.quarantine(request)
        else:
            # Before `admit` nothing a peer sends counts as computed, so none of it gets into the prefix cache here.
            self._memory.release(request)
        self._end(request)
        return True

    def drained(self, key: Hashable) -> None:
        """No write to the pages quarantined under `key` can land any more. Raises KeyError for an unknown key."""
        self._memory.drained(key)
        self._stalled = False

    def release(self, key: Hashable) -> None:
        """A retained request's pages are needed no more.

        Raises KeyError when there is none of that key, ValueError when its first token is not sampled yet.
        """
        request = self._requests[key]
        if request.status is not RequestStatus.SENDING:
            raise ValueError(f"request {key!r} is {request.status.name}; only a SENDING one can be released")
        self._memory.release(request)
        self._end(request)

    # ---- a step ---------------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        """Whether a step could do something.

        False too while requests wait for pages that only another verb can free, so that the caller can sleep.
        """
        return bool(self._scheduler.running) or (bool(self._scheduler.waiting) and not self._stalled)

    def step(self) -> StepOutput:
        """Compute one batch. An error in the model or the sampler ends the requests of that batch and no others; logits
        that are not finite end only theirs.
        """
        output = StepOutput()
        work = self._scheduler.schedule()
        self._stalled = not work
        if not work:
            return output
        sampling = [item.request for item in work if item.finishes]
        try:
            sampled, scored = self._runner.run(work, sampling)
        except LogitsError as error:
            # Nothing was taken from this batch, so the next step computes the other requests' part of it again.
            for row in error.rows:
                self._fail(sampling[row], _no_token(stuck=row in error.masked), output, by_grammar=row in error.masked)
            return output
        except PromptLogitsError as error:
            self._fail(error.request, "the model gave no finite logits within the prompt of this request", output)
            return output
        except Exception as error:
            _LOG.exception("a batch of %d requests failed", len(work))
            for item in work:
                self._fail(item.request, f"the model failed on this batch: {error!r}", output)
            return output
        self.counters.steps += 1
        for item in work:
            self.counters.computed_tokens += item.count
            item.request.num_computed += item.count
            if item.request.retain:
                output.progress.append((item.request, item.request.num_computed))
            elif item.count > 1 and item.request.num_computed == item.request.num_tokens:
                self._memory.publish(item.request)
        for request, scores in scored:
            request.next_score += len(scores.logprobs)
        output.scores.extend(scored)
        for request, result in zip(sampling, sampled, strict=True):
            self._take(request, result, output)
        return output

    def _take(self, request: Request, sampled: Sampled, output: StepOutput) -> None:
        """Add a sampled token to its request and move the request on."""
        position = request.num_generated
        try:
            ended = self._generations.check(request, sampled.token)
        except GrammarMismatch as error:
            self._fail(request, str(error), output, by_grammar=True)
            return
        except Exception as error:
            _LOG.exception("the text of request %r failed", request.key)
            self._fail(request, f"making text of token {sampled.token} failed: {error!r}", output)
            return
        self._generations.append(request, sampled.token)
        finish, matched = ended if ended is not None else (None, None)
        cached = min(request.num_cached, request.num_prompt_tokens) if request.num_outputs == 0 else None
        request.num_outputs += 1
        self.counters.generated_tokens += 1
        output.tokens.append(
            TokenOutput(
                request,
                position,
                sampled.token,
                sampled.logprob,
                sampled.top,
                finish,
                matched,
                cached,
                sampled.named,
            )
        )
        if finish is not None:
            self._scheduler.remove(request)
            self._memory.release(request)
            self._end(request)
        elif request.retain:
            self._scheduler.remove(request)
            self._memory.publish(request)
            request.move_to(RequestStatus.SENDING)

    # ---- what is known about it -----------------------------------------------------------------------------

    def load(self) -> Load:
        """What the engine holds now. Running are all that have a place in the batch, reserved ones too."""
        scheduler, memory = self._scheduler, self._memory
        return Load(
            waiting_requests=len(scheduler.waiting),
            waiting_tokens=scheduler.num_waiting_tokens,
            running_requests=len(scheduler.running) + len(scheduler.reserved),
            free_pages=memory.count(PageState.FREE),
            cached_pages=memory.count(PageState.CACHED),
            total_pages=self.config.num_pages,
        )

    def audit(self) -> AuditReport:
        """Count every page by its owner. Walks everything: not for every step."""
        return audit(self._memory, self._requests.values())

    def get(self, key: Hashable) -> Request | None:
        """The registered request of that key."""
        return self._requests.get(key)

    def num_prefix_tokens(self, tokens: Sequence[int], *, namespace: str = "") -> int:
        """Leading tokens whose KV the prefix cache has, in whole pages."""
        return self._memory.num_cached_tokens(tokens, namespace=namespace)

    def flush_cache(self) -> int:
        """Drop every cached prefix that no request holds; returns the pages freed."""
        return self._memory.flush_cache()

    # ---- inside ---------------------------------------------------------------------------------------------

    def _check(self, request: Request) -> None:
        """Refuse what can never be served, and set the request's length limit."""
        if request.key in self._requests or request.key in self._memory.quarantined:
            raise ValueError(f"there is a request {request.key!r} already; keys must differ")
        check_vocabulary(request, vocab_size=self._limits.vocab_size)
        if request.sampling.grammar is not None and (request.constraint is None or not self._generations.has_masks):
            raise ValueError(f"request {request.key!r} has a grammar that nobody compiled, so it cannot be followed")
        request.limit = sequence_limit(request, max_context=self.max_context, has_text=self._generations.has_text)

    def _register(self, request: Request) -> None:
        self._stalled = False
        self._requests[request.key] = request
        if not request.registration:
            self._registrations += 1
            request.registration = self._registrations

    def _fail(self, request: Request, why: str, output: StepOutput, *, by_grammar: bool = False) -> None:
        """End a request whose KV cannot be trusted any more, or that no token can follow."""
        self._scheduler.remove(request)
        self._memory.drop(request)
        self._end(request)
        if by_grammar:
            self.counters.grammar_failures += 1
        else:
            self.counters.failed += 1
        output.failed.append(Failed(request, why, by_grammar))

    def _end(self, request: Request) -> None:
        request.move_to(RequestStatus.FINISHED)
        self._forget(request)

    def _forget(self, request: Request) -> None:
        self._stalled = False
        del self._requests[request.key]
        self._generations.forget(request.key)


def _no_token(*, stuck: bool) -> str:
    if stuck:
        return "its grammar came to a point that no token of this model can follow"
    return "the model gave no finite logits for this request"

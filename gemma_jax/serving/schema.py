"""What requests for texts have in common, whatever their route, as our dataclasses."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

from gemma_jax.inference.requests import Request
from gemma_jax.inference.sampling import Sampling
from gemma_jax.inference.text_writer import split_stops
from gemma_jax.multimodal.prompts import Prompt
from gemma_jax.serving.errors import ApiError, refused
from gemma_jax.serving.fields import Fields
from gemma_jax.serving.limits import Limits
from gemma_jax.serving.served import Served

ONLY_ALONE = "this server answers each request alone and keeps nothing"
BIAS, MOST_BIASES = 100.0, 300  # the largest of a logit; of one request, as in the API
_INT64 = 2**63


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Says how answers are to be written.

    Attributes:
      model: The name that was asked for.
      adapter: Which of those that the model holds; `None`: the model alone.
      choices: How many answers to each prompt.
      seed: Of the first answer; the others count on. `None`: any.
      max_new_tokens: `None`: what the context leaves.
      stops: Texts that end an answer.
      stop_ids: Tokens that do, beside those of the model.
      ignore_eos: The tokens of the model do not.
      log_probs: Most probable tokens to tell of at each place; `None`: no log-probabilities at all.
      include_usage: A stream ends with the numbers of tokens.
      continuous_usage: Each event has those so far.
      user: Who it is for, by the client's word, for the log.
    """

    model: str
    adapter: str | None = None
    sampling: Sampling
    choices: int = 1
    seed: int | None = None
    max_new_tokens: int | None = None
    stops: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: Mapping[int, float]
    log_probs: int | None = None
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    user: str = ""

    def requests(
        self, prompt: Prompt, served: Served, *, owner: str, deadline: float, model_stops: tuple
    ) -> list[Request]:
        """What to ask the engine for one prompt.

        Args:
          model_stops: Ids that end an answer by themselves.

        Raises:
          ApiError: Prompt and answer are longer than the context.
        """
        room, length = served.context - len(prompt.token_ids), len(prompt.token_ids)
        bound = served.limits.new_tokens or served.context
        new = min(room, bound) if self.max_new_tokens is None else self.max_new_tokens
        needed = 0 if self.max_new_tokens == 0 else max(new, 1)
        if needed > room:
            raise refused(
                f"the prompt has {length} tokens and its answer up to {needed}, together more "
                f"than the {served.context} of this server's context",
                "messages",
                "context_length_exceeded",
            )
        if new > bound:
            raise refused(f"{new} new tokens are more than {bound}", "max_tokens")
        _, special = split_stops(served.tokenizer, self.stops)
        stop_ids = (*(() if self.ignore_eos else model_stops), *special, *self.stop_ids)
        first = random.SystemRandom().getrandbits(32) if self.seed is None else self.seed
        one = Request(
            prompt=prompt,
            max_new_tokens=new,
            sampling=self.sampling,
            stop_ids=tuple(dict.fromkeys(stop_ids)),
            top_log_probs=self.log_probs or 0,
            logit_bias=self.logit_bias,
            adapter=self.adapter,
            owner=owner,
            deadline=deadline,
        )
        return [replace(one, seed=(first + i) % 2**32) for i in range(self.choices)]


def read_wanted(
    fields: Fields, served: Served, *, new_tokens: int | None, log_probs: int | None
) -> Wanted:
    """The fields that chat and completions share.

    Args:
      new_tokens, log_probs: What the route's own fields say.

    Raises:
      ApiError: A value that cannot be honoured.
    """
    limits = served.limits
    name = fields.text("model")
    adapter = served.find(name)
    stream = fields.boolean("stream")
    include_usage, continuous_usage = _usage(fields, stream)
    _refuse_others(fields)
    return Wanted(
        model=name or served.name,
        adapter=adapter,
        sampling=read_sampling(fields, served.sampling),
        choices=fields.integer("n", 1, low=1, high=limits.choices),
        seed=fields.integer("seed", low=-_INT64, high=_INT64 - 1),
        max_new_tokens=new_tokens,
        stops=read_stops(fields, served),
        stop_ids=_stop_ids(fields, served),
        ignore_eos=fields.boolean("ignore_eos"),
        logit_bias=_logit_bias(fields, served),
        log_probs=log_probs,
        stream=stream,
        include_usage=include_usage,
        continuous_usage=continuous_usage,
        user=fields.text("user", "", most=256),
    )


def read_sampling(fields: Fields, default: Sampling) -> Sampling:
    """How tokens are chosen; `default` where nothing is said.

    Raises:
      ApiError: An impossible value.
    """
    largest = 1e20
    given = {
        name: fields.number(name, low=0, high=largest)
        for name in ("temperature", "top_p", "min_p", "repetition_penalty")
    }
    for name in ("presence_penalty", "frequency_penalty"):
        given[name] = fields.number(name, low=-2, high=2)
    given["top_k"] = fields.integer("top_k", low=-1, high=1 << 31)
    if given["top_k"] == -1:
        given["top_k"] = 0  # as other servers spell "all"
    try:
        return replace(default, **{name: v for name, v in given.items() if v is not None})
    except ValueError as error:
        raise refused(str(error), str(error).partition("=")[0]) from None


def read_stops(fields: Fields, served: Served) -> tuple[str, ...]:
    """Texts that end an answer: one, or a list of them."""
    value, limits = fields.raw("stop"), served.limits
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return ()
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise fields.error("expected a text or a list of texts, none of them empty", "stop")
    if len(stops) > limits.stops or any(len(stop) > limits.stop_characters for stop in stops):
        raise fields.error(
            f"expected at most {limits.stops} texts of at most {limits.stop_characters} characters",
            "stop",
        )
    try:
        split_stops(served.tokenizer, stops)
    except ValueError as error:
        raise fields.error(str(error), "stop") from None
    return tuple(stops)


def new_tokens(
    fields: Fields, limits: Limits, *names: str, default: int | None = None, least: int = 1
) -> int | None:
    """Bound on an answer, under whichever of its names it is given."""
    most = limits.new_tokens or (1 << 31)
    given = {name: fields.integer(name, low=least, high=most) for name in names}
    values = {value for value in given.values() if value is not None}
    if len(values) > 1:
        raise fields.error(f"give {' or '.join(names)}, not both", names[0])
    return values.pop() if values else default


def _stop_ids(fields: Fields, served: Served) -> tuple[int, ...]:
    name, size = "stop_token_ids", served.cfg.vocab_size
    ids = fields.items(name, most=64) or []
    if not all(type(i) is int and 0 <= i < size for i in ids):
        raise fields.error(f"expected token ids in [0, {size})", name)
    return tuple(ids)


def _logit_bias(fields: Fields, served: Served) -> dict[int, float]:
    size, given = served.cfg.vocab_size, fields.object("logit_bias")
    if given is None:
        return {}
    bias = {}
    for name in given.names():
        if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < size):
            raise given.error(f"expected a token id below {size}", name[:20])
        bias[int(name)] = given.number(name, 0.0, low=-BIAS, high=BIAS)
    if len(bias) > MOST_BIASES:
        raise fields.error(f"more than {MOST_BIASES} tokens", "logit_bias")
    return bias


def _usage(fields: Fields, stream: bool) -> tuple[bool, bool]:
    """Whether a stream ends with the numbers of tokens, and whether all its events have them."""
    options = fields.object("stream_options")
    if options is None:
        return False, False
    if not stream:
        raise fields.error("is for streams alone", "stream_options")
    options.only("include_obfuscation", False, because="nothing is added to events")
    include = options.boolean("include_usage")
    continuous = options.boolean("continuous_usage_stats")
    if continuous and not include:
        raise options.error("needs include_usage: true", "continuous_usage_stats")
    options.close()
    return include, continuous


def _refuse_others(fields: Fields) -> None:
    """Fields of the API that would change something here, if they were honoured."""
    fields.only("store", False, because=ONLY_ALONE)
    fields.only("metadata", {}, because=ONLY_ALONE)
    fields.only("service_tier", "auto", "default", because="there is one tier")
    fields.only("prompt_cache_key", because="beginnings of prompts are found without a key")
    fields.only("prompt_cache_retention", because="the server decides what it keeps")
    fields.only("safety_identifier", because="give user")


def context_error(error: Exception, param: str | None) -> ApiError:
    """What the library says of a prompt that it cannot read."""
    return refused(str(error), param)

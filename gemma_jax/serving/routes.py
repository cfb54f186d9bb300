"""The small routes: models, tokens, health, metrics."""

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gemma_jax.multimodal.modality import modalities_of
from gemma_jax.serving.events import JSON
from gemma_jax.serving.fields import Fields
from gemma_jax.serving.messages import read_messages
from gemma_jax.serving.state import State
from gemma_jax.serving.tools import chat_prompt, read_tools

_MOST = 1 << 20  # tokens to turn into text at a time


def _state(http: HttpRequest) -> State:
    return http.app.state.server


def _model(state: State, name: str) -> dict:
    return {
        "id": name,
        "object": "model",
        "created": state.served.created,
        "owned_by": "gemma-jax",
        "max_model_len": state.served.context,
        "input_modalities": ["text", *(one.name for one in modalities_of(state.served.cfg))],
    }


async def models(http: HttpRequest) -> Response:
    """GET /v1/models."""
    state = _state(http)
    data = [_model(state, name) for name in state.served.models]
    return JSON({"object": "list", "data": data})


async def model(http: HttpRequest) -> Response:
    """GET /v1/models/{id}."""
    state, name = _state(http), http.path_params["id"]
    state.served.find(name)
    return JSON(_model(state, name))


async def tokenize(http: HttpRequest) -> Response:
    """POST /tokenize: a prompt, or messages, to token ids."""
    state = _state(http)
    return JSON(await state.read(_tokenize, await state.fields(http), state))


def _tokenize(fields: Fields, state: State) -> dict:
    served = state.served
    served.find(fields.text("model"))
    text = fields.text("prompt")
    special = fields.boolean("add_special_tokens", True)
    if text is None:
        conversation = read_messages(fields, state.media())
        use = read_tools(fields, served.tokenizer, served.limits)
        fields.close()
        ids = chat_prompt(served.reader(), conversation.messages, use).token_ids
    else:
        fields.close()
        ids = served.tokenizer.encode(text, bos=special and served.tokenizer.add_bos)
    return {"tokens": ids, "count": len(ids), "max_model_len": served.context}


async def detokenize(http: HttpRequest) -> Response:
    """POST /detokenize: token ids to their text."""
    state = _state(http)
    return JSON(await state.read(_detokenize, await state.fields(http), state))


def _detokenize(fields: Fields, state: State) -> dict:
    served = state.served
    served.find(fields.text("model"))
    ids, size = fields.items("tokens", most=_MOST), served.cfg.vocab_size
    if ids is None or not all(type(i) is int and 0 <= i < size for i in ids):
        raise fields.error(f"expected a list of token ids in [0, {size})", "tokens")
    fields.close()
    return {"prompt": served.tokenizer.decode(ids)}


async def health(http: HttpRequest) -> Response:
    """GET /health: the process lives."""
    return JSON({"status": "ok"})


async def ready(http: HttpRequest) -> Response:
    """GET /ready: new requests are welcome."""
    _state(http).require_open()
    return JSON({"status": "ok"})


async def metrics(http: HttpRequest) -> Response:
    """GET /metrics, for Prometheus."""
    content, kind = _state(http).metrics.text()
    return Response(content, headers={"Content-Type": kind})

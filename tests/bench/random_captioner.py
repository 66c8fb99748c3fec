"""The captioner of the paper profile with nothing to download: a Llama of random weights, and a tokenizer made on the spot."""
from __future__ import annotations

import re
import time
from dataclasses import replace
from functools import cached_property
from unittest import mock

import torch

from dl.config import CaptionerConfig


class RandomCaptioner:
    """``dl.captioner.LLMCaptioner`` over a Llama of random weights that is made on the device; built once, when first asked for.

    Args:
        embed_dim: D.
        captioner: its configuration; the language model that it names is not looked up.
        llama: fields of LlamaConfig that are not Llama-2-7B's.
        device: where it is made.
    """

    def __init__(self, embed_dim: int, captioner: CaptionerConfig, llama: dict, device: torch.device) -> None:
        self.embed_dim, self.settings, self.llama, self.device = embed_dim, captioner, llama, device

    @cached_property
    def captioner(self):
        """The captioner on the device, its constructor's own code, but for the loader of the language model."""
        import transformers

        if not hasattr(transformers, "GgufConfig"):      # dl reads SmolLM2 with it; an older transformers has none, and none is needed here
            transformers.GgufConfig = None
        from dl import captioner as module

        with mock.patch.object(module, "load_language_model", self.load):
            return module.LLMCaptioner(self.embed_dim, self.settings).to(self.device)

    def load(self, name: str, revision: str | None, dtype: torch.dtype, four_bit: bool = False) -> tuple:
        """As ``load_language_model``: (frozen model in eval mode, tokenizer)."""
        from transformers import AutoModelForCausalLM, GenerationConfig

        tokenizer = word_tokenizer(self.settings.prompt, self.config.vocab_size)
        with torch.device(self.device):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(self.config, dtype=dtype)
        model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
        return model.eval().requires_grad_(False), tokenizer

    @cached_property
    def config(self):
        """LlamaConfig; its defaults are Llama-2-7B's: hidden 4096, 32 layers, 32 heads, inner 11008, vocabulary 32000."""
        from transformers import LlamaConfig

        return LlamaConfig(**self.llama)

    @property
    def dtype(self) -> str:
        """Of the frozen weights."""
        return str(self.captioner.language_model.dtype).removeprefix("torch.")

    @property
    def parameters(self) -> tuple[int, int]:
        """N, the numbers in the matrices of all layers, and H, those in the output matrix."""
        h, inner = self.config.hidden_size, self.config.intermediate_size
        return self.config.num_hidden_layers * (4 * h * h + 3 * h * inner), h * self.config.vocab_size

    def train(self, batch: int, checkpointing: bool, tokens: int) -> tuple[list[float], int]:
        """Run ``train_captioner`` on random captions of ``tokens`` tokens with eos; (clock at the end of each step, S positions of a row)."""
        from dl.captioner_train import train_captioner

        captioner = self.captioner
        captioner.config = replace(self.settings, batch_size=batch, gradient_checkpointing=checkpointing)
        base = captioner.language_model.get_base_model()
        base.gradient_checkpointing_enable({"use_reentrant": False}) if checkpointing else base.gradient_checkpointing_disable()
        generator = torch.Generator().manual_seed(0)
        words = torch.randint(self.config.vocab_size - 16, (4 * batch, tokens - 1), generator=generator).tolist()
        captions = [" ".join(f"word{i}" for i in row) for row in words]
        embeddings = torch.randn(len(captions), self.embed_dim, generator=generator)
        marks: list[float] = []
        train_captioner(captioner, embeddings, captions, callback=lambda *_: marks.append(time.perf_counter()))
        with torch.inference_mode():
            positions = captioner.context(embeddings[:1]).shape[1] + tokens - 1
        return marks, positions


def word_tokenizer(prompt: str, vocab_size: int):
    """A tokenizer of whole words that needs no file: <unk> <s> </s> as Llama's, a newline, the prompt's words, then word0, word1, ..."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pattern = r"\n|\w+|[^\w\s]"
    words = list(dict.fromkeys(["<unk>", "<s>", "</s>", "\n", *re.findall(pattern, prompt)]))
    words += [f"word{i}" for i in range(vocab_size - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>")

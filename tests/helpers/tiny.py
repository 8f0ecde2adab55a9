"""Tiny random models with real tokenizers, made in seconds without a model hub.

    python tests/helpers/tiny.py FOLDER

writes what the runtime's tests need where there is no torch: an exported model, adapters for it and PyTorch's answers.
"""

import sys
from pathlib import Path
from typing import Any

VOCABULARY = 320
HIDDEN, LAYERS = 64, 3
SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"tie_word_embeddings": False, "head_dim": 16, "sliding_window": 8},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False, "head_dim": 16},
    "phi3": {"tie_word_embeddings": False, "original_max_position_embeddings": 256, "sliding_window": 8},
    "smollm3": {"tie_word_embeddings": True},
    "granite": {"tie_word_embeddings": True, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "gemma": {"tie_word_embeddings": True, "head_dim": 16},
    "gemma2": {
        "tie_word_embeddings": True,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 10.0,
    },
    "gemma3_text": {
        "tie_word_embeddings": True,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "olmo": {"tie_word_embeddings": False},
    "phi": {"tie_word_embeddings": False, "head_dim": 16, "partial_rotary_factor": 1.0},
    "nemotron": {"tie_word_embeddings": False, "head_dim": 16, "partial_rotary_factor": 1.0},
    "hunyuan_v1_dense": {"tie_word_embeddings": True, "head_dim": 16},
    "gpt_oss": {
        "tie_word_embeddings": False,
        "head_dim": 16,
        "sliding_window": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "ernie4_5": {"tie_word_embeddings": True, "head_dim": 16},
    "ministral": {"tie_word_embeddings": False, "head_dim": 16, "sliding_window": 8},
    "seed_oss": {"tie_word_embeddings": False, "head_dim": 16},
    "granitemoehybrid": {
        "tie_word_embeddings": True,
        "layer_types": ["attention"] * LAYERS,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 96,
        "position_embedding_type": "rope",
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
    },
    "gemma4_text": {
        "tie_word_embeddings": True,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_global_key_value_heads": 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 10.0,
    },
    "lfm2": {"tie_word_embeddings": True, "layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {
        "tie_word_embeddings": True,
        "layer_types": ["conv", "full_attention", "conv"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_dense_layers": 1,
        "moe_intermediate_size": 32,
    },
    "qwen3_5_text": {
        "tie_word_embeddings": True,
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_interleaved": True,
            "mrope_section": [2, 1, 1],
        },
    },
}
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TEXT = (
    "The quick brown fox jumps over the lazy dog. How are you today? I am well, thank you. "
    "Water boils when it is hot; ice melts when it is warm. Who are you?"
) * 4


def make_model(folder: Path, architecture: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """Save a tiny random model and tokenizer in the Hugging Face layout."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        architecture, **{**SHARED, **ARCHITECTURES.get(architecture, {}), **changes}
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.uniform_(-0.2, 0.2)
        for name, content in model.named_buffers():
            if name.endswith("layer_scalar"):
                content.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|start|>", "<|end|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|end|>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {"type_vocab_size": 2},
    "roberta": {"type_vocab_size": 1, "pad_token_id": 2},
    "distilbert": {},
}


def make_encoder(folder: Path, architecture: str = "bert", seed: int = 0, pooling: str = "") -> Path:
    """Save a tiny random encoder and tokenizer in the Hugging Face layout; `mean` pooling as sentence-transformers says it."""
    import json

    import torch
    from transformers import AutoConfig, AutoModel

    sizes = {name: SHARED[name] for name in ("vocab_size", "max_position_embeddings", "initializer_range")}
    if architecture == "distilbert":
        sizes |= {"dim": HIDDEN, "hidden_dim": 96, "n_layers": LAYERS, "n_heads": 4}
    else:
        sizes |= {name: SHARED[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
        sizes |= {"num_attention_heads": 4}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **sizes, **ENCODERS[architecture])
    AutoModel.from_config(config).save_pretrained(folder)
    _make_encoder_tokenizer(folder)
    if pooling == "mean":
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    return folder


def _make_encoder_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer that wraps texts as BERT does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["[CLS]", "[SEP]", "[PAD]"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 0), ("[SEP]", 1)],
    )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8, pad_id=2, pad_token="[PAD]")
    tokenizer.save(str(folder / "tokenizer.json"))


CLASSIFIED = [
    "A",
    "Water boils at one hundred degrees.",
    "The capital of France is Paris, of Italy it is Rome.",
]


def write_device_folder(folder: Path) -> None:
    """A decoder with adapters and PyTorch's greedy tokens, an encoder with an adapter and PyTorch's probabilities, for tests on a machine without torch."""
    import json

    from reft_edge.export import export_model
    from reft_edge.model.encoders import load_encoder
    from reft_edge.model.loading import load_model
    from reft_edge.model.prompts import load_prompts
    from reft_edge.model.source import ModelFolder
    from reft_edge.steering.hooks import steered
    from reft_edge.steering.interventions import Interventions
    from tests.helpers.torch_reference import greedy, random_adapter, random_classifier, torch_probabilities

    folder.mkdir(parents=True, exist_ok=True)
    source = ModelFolder(make_model(folder / "hf"), "tiny-llama")
    export_model(source, folder / "export")
    model, prompts = load_model(source), load_prompts(source.path)
    ids = prompts.encode_prompt("Who are you?", "chat")
    expected = {"base": greedy(model, ids, 24)}
    for name, positions, seed in (
        ("first", "f3+l3", 1),
        ("everywhere", "all+gen", 2),
        ("opening", "f2+gen3", 3),
    ):
        adapter = random_adapter(model, positions=positions, seed=seed, path=folder / f"{name}.safetensors")
        with steered(model, (Interventions.from_adapter(adapter), 1.0)):
            expected[name] = greedy(model, ids, 24)
    (folder / "expected.json").write_text(json.dumps(expected))

    source = ModelFolder(make_encoder(folder / "encoder-hf"), "tiny-bert")
    export_model(source, folder / "encoder")
    encoder = load_encoder(source)
    adapter = random_classifier(encoder, folder / "labels.safetensors")
    probabilities = [
        [float(share) for share in row] for row in torch_probabilities(source, encoder, adapter, CLASSIFIED)
    ]
    (folder / "probabilities.json").write_text(json.dumps(probabilities))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    write_device_folder(Path(sys.argv[1]))

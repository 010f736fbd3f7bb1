"""The architectures of `transformers`, made tiny, with random weights."""

from collections.abc import Callable

import torch

from models.case import Case, seeded


def text():
    return {"input_ids": torch.arange(14).reshape(2, 7) % 90 + 5}


def _text_pair():
    return {**text(), "decoder_input_ids": text()["input_ids"]}


def _image():
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def _text_and_image():
    return {**text(), **_image()}


def _wave():
    return {"input_values": torch.randn(2, 400)}


def _mono():
    return {"input_values": torch.randn(1, 1, 320)}


def _spectrum():
    return {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": text()["input_ids"]}


_SIZE = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {**_SIZE, "intermediate_size": 64, "max_position_embeddings": 64}
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_IMAGE = {**_TEXT, "image_size": 32, "patch_size": 8}
SPEECH = {
    **_TEXT,
    "conv_dim": [16, 16],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 4],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SEQ2SEQ = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
_DEEPSEEK = {
    **_TEXT,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}


def _hf(name, config, inputs=text, dtype=torch.float32) -> Callable[[], Case]:
    """A factory of the `transformers` model class `name` in evaluation mode."""

    @seeded
    def build():
        import transformers

        cls = getattr(transformers, name)
        model = cls(cls.config_class(**config)).eval().to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():  # else biases all alike would hide a mix-up
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        return Case(model, kwargs=inputs())

    return build


ARCHITECTURES: dict[str, Callable[[], Case]] = {
    "albert": _hf("AlbertModel", {**_TEXT, "embedding_size": 16}),
    "bart": _hf("BartForConditionalGeneration", {**_SEQ2SEQ, "max_position_embeddings": 64}),
    "bert": _hf("BertModel", _TEXT),
    "bloom": _hf(
        "BloomForCausalLM", {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    ),
    "clip": _hf(
        "CLIPModel",
        {"projection_dim": 16, "text_config": {**_TEXT, **_ENDS}, "vision_config": _IMAGE},
        _text_and_image,
    ),
    "convnext": _hf(
        "ConvNextModel", {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2}, _image
    ),
    "deberta_v2": _hf(
        "DebertaV2Model",
        {
            **_TEXT,
            "relative_attention": True,
            "position_buckets": 8,
            "pos_att_type": ["p2c", "c2p"],
        },
    ),
    "deepseek_v3": _hf("DeepseekV3ForCausalLM", _DEEPSEEK),
    "distilbert": _hf(
        "DistilBertModel",
        {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    ),
    "electra": _hf("ElectraModel", {**_TEXT, "embedding_size": 16}),
    "encodec": _hf(
        "EncodecModel",
        {
            "num_filters": 4,
            "hidden_size": 16,
            "codebook_size": 32,
            "codebook_dim": 16,
            "upsampling_ratios": [4, 2],
            "target_bandwidths": [24.0],
            "num_lstm_layers": 1,
        },
        _mono,
    ),
    "falcon": _hf("FalconForCausalLM", _SIZE),
    "gemma2": _hf("Gemma2ForCausalLM", {**_GROUPED, "head_dim": 8}),
    "gpt2": _hf(
        "GPT2LMHeadModel",
        {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **_ENDS},
    ),
    "gpt_neox": _hf("GPTNeoXForCausalLM", _TEXT),
    "hubert": _hf("HubertModel", SPEECH, _wave),
    "llama": _hf(
        "LlamaForCausalLM", {**_GROUPED, "tie_word_embeddings": True}, dtype=torch.bfloat16
    ),
    "mamba": _hf(
        "MambaForCausalLM",
        {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    ),
    "mistral": _hf("MistralForCausalLM", _GROUPED),
    "mixtral": _hf("MixtralForCausalLM", {**_GROUPED, "num_local_experts": 4}),
    "modernbert": _hf("ModernBertModel", {**_TEXT, **_ENDS, "cls_token_id": 1, "sep_token_id": 2}),
    "mpnet": _hf("MPNetModel", _TEXT),
    "opt": _hf(
        "OPTForCausalLM",
        {**_SIZE, "ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 16},
    ),
    "phi": _hf("PhiForCausalLM", _TEXT),
    "qwen2": _hf("Qwen2ForCausalLM", _GROUPED),
    "resnet": _hf(
        "ResNetModel",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"},
        _image,
    ),
    "roberta": _hf("RobertaModel", _TEXT),
    "rwkv": _hf(
        "RwkvForCausalLM",
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "attention_hidden_size": 32,
            "context_length": 64,
        },
    ),
    "segformer": _hf(
        "SegformerModel",
        {
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "num_encoder_blocks": 2,
            "num_attention_heads": [2, 2],
            "sr_ratios": [2, 1],
            "strides": [4, 2],
            "patch_sizes": [7, 3],
            "mlp_ratios": [2, 2],
        },
        _image,
    ),
    "swin": _hf(
        "SwinModel",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 4,
        },
        _image,
    ),
    "t5": _hf(
        "T5ForConditionalGeneration",
        {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        _text_pair,
    ),
    "vit": _hf("ViTModel", _IMAGE, _image),
    "wav2vec2": _hf("Wav2Vec2Model", SPEECH, _wave),
    "wavlm": _hf("WavLMModel", SPEECH, _wave),
    "whisper": _hf(
        "WhisperForConditionalGeneration",
        {
            **_SEQ2SEQ,
            **_ENDS,
            "decoder_start_token_id": 1,
            "num_mel_bins": 8,
            "max_source_positions": 20,
            "max_target_positions": 20,
        },
        _spectrum,
    ),
}

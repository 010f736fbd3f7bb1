"""The models every test and bench uses: seeded random weights, nothing from a hub.

`simple`, `large`, `transformer`, `bert_base` are for everyday use. Three tables, name -> factory,
hold the rest: `DIFFICULT` (what makes serializers stumble), `ARCHITECTURES` (real ones, made tiny)
and `LAYOUTS` (tensors of every dtype and every odd layout). A factory of `LAYOUTS` returns a tensor
or a list of them, every other factory a `Case`. Only the factories that need `transformers` import
it.
"""

import functools
import itertools
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import utils as nn_utils
from torch.nn.utils import parametrizations


def _call(model, *args, **kwargs):
    return model(*args, **kwargs)


@dataclass
class Case:
    """A model and one call of it; `call` is None where there is nothing to call."""

    model: Any
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)
    call: Callable | None = _call

    def run(self, model=None):
        """The output of the call on `model`, by default the case's own; one seed, no autograd."""
        torch.manual_seed(0)
        with torch.no_grad():
            return self.call(self.model if model is None else model, *self.args, **self.kwargs)


def _seeded(factory):
    @functools.wraps(factory)
    def build():
        torch.manual_seed(0)
        return factory()

    return build


def _entry(table):
    def register(factory):
        table[factory.__name__] = _seeded(factory)
        return table[factory.__name__]

    return register


def _mlp(*widths, **kwargs):
    layers = [nn.Linear(*pair, **kwargs) for pair in itertools.pairwise(widths)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])


# --- everyday -------------------------------------------------------------------------------------


@_seeded
def simple() -> Case:
    """A three-layer perceptron of a few kilobytes."""
    return Case(_mlp(16, 32, 32, 4).eval(), (torch.randn(3, 16),))


@_seeded
def large() -> Case:
    """A perceptron of 64 MiB whose activations are a few kilobytes."""
    return Case(_mlp(2048, 2048, 2048, 2048, 2048).eval(), (torch.randn(2, 2048),))


class Transformer(nn.Module):
    """Embedding, self-attention and a head tied to the embedding."""

    def __init__(self, vocab=97, width=32, heads=4, layers=2):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers)
        self.head = nn.Linear(width, vocab)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.encoder(self.embed(ids)))


@_seeded
def transformer() -> Case:
    """A small encoder with attention and tied weights."""
    return Case(Transformer().eval(), (torch.randint(0, 97, (2, 7)),))


@_seeded
def bert_base() -> Case:
    """BERT-base by its default configuration: 201 tensors, 418 MiB."""
    from transformers import BertConfig, BertModel

    return Case(BertModel(BertConfig()).eval(), kwargs=_text())


# --- difficult ------------------------------------------------------------------------------------

DIFFICULT: dict[str, Callable[[], Case]] = {}
_difficult = _entry(DIFFICULT)


@_difficult
def tied_weights():
    return transformer()


@_difficult
def bfloat16():
    return Case(_mlp(16, 32, 4).to(torch.bfloat16), (torch.randn(3, 16).to(torch.bfloat16),))


@_difficult
def float16():
    return Case(_mlp(16, 32, 4).half(), (torch.randn(3, 16).half(),))


@_difficult
def channels_last():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    net(torch.randn(4, 3, 8, 8))  # in train mode: no round numbers in the running statistics
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    return Case(net.eval().to(memory_format=torch.channels_last), (x,))


@_difficult
def lstm():
    return Case(nn.LSTM(8, 16, num_layers=2, bidirectional=True), (torch.randn(5, 2, 8),))


@_difficult
def gru():
    return Case(nn.GRU(8, 16, num_layers=2), (torch.randn(5, 2, 8),))


@_difficult
def weight_norm():
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 4))
    return Case(net, (torch.randn(3, 8),))


@_difficult
def orthogonal():
    return Case(parametrizations.orthogonal(nn.Linear(8, 8)), (torch.randn(3, 8),))


@_difficult
def spectral_norm():
    return Case(parametrizations.spectral_norm(nn.Linear(8, 8)).eval(), (torch.randn(3, 8),))


@_difficult
def parametrized_twice():
    layer = parametrizations.weight_norm(nn.Linear(8, 8))
    parametrizations.weight_norm(layer, "bias", dim=None)
    return Case(layer, (torch.randn(3, 8),))


@_difficult
def hooked_weight_norm():
    return Case(nn_utils.weight_norm(nn.Linear(8, 8)), (torch.randn(3, 8),))


@_difficult
def hooked_spectral_norm():
    return Case(nn_utils.spectral_norm(nn.Linear(8, 8)).eval(), (torch.randn(3, 8),))


class Holder(nn.Module):
    """A linear layer that carries whatever else it is given as attributes."""

    def __init__(self, **attributes):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.linear(x)


@_difficult
def non_persistent_buffers():
    model = Holder()
    model.register_buffer("kept", torch.randn(4))
    model.register_buffer("dropped", torch.randn(4), persistent=False)
    model.register_buffer("absent", None)
    return Case(model, (torch.randn(3, 8),))


@_difficult
def buffer_class():
    model = Holder(
        kept=nn.Buffer(torch.randn(4)), dropped=nn.Buffer(torch.randn(4), persistent=False)
    )
    return Case(model, (torch.randn(3, 8),))


@_difficult
def none_parameters():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.LayerNorm(8, elementwise_affine=False))
    model.register_module("absent", None)
    return Case(model, (torch.randn(3, 8),), call=lambda m, x: m[1](m[0](x)))


@_difficult
def plain_tensor_attributes():
    model = Holder(scale=torch.randn(8), grid=torch.arange(6.0).reshape(2, 3).t())
    model.alias = model.scale
    return Case(model, (torch.randn(3, 8),), call=lambda m, x: m(x) * m.alias)


@_difficult
def tensors_in_containers():
    shared = torch.randn(8)
    model = Holder(
        items=[shared, torch.randn(2)],
        table={"a": shared, 3: (torch.randn(1), [torch.randn(2, 2)])},
        nothing=[],
    )
    return Case(model, (torch.randn(3, 8),), call=lambda m, x: m(x) + m.table["a"])


@_difficult
def parameter_containers():
    model = Holder(
        plist=nn.ParameterList([torch.randn(8), torch.randn(8)]),
        pdict=nn.ParameterDict({"one": torch.randn(8), "two": nn.Parameter(torch.randn(8))}),
        mdict=nn.ModuleDict({"x": nn.Linear(8, 8), "y": nn.Identity()}),
    )
    return Case(model, (torch.randn(3, 8),), call=lambda m, x: m.mdict["x"](m(x)) + m.plist[1])


def double_output(module, args, output):
    return 2 * output


def negate_input(module, args, kwargs):
    return tuple(-arg for arg in args), kwargs


def add_output(by, module, args, output):
    return output + by


@_difficult
def hooks():
    model, shift = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), torch.randn(8)
    model.register_forward_hook(double_output)
    model.register_forward_pre_hook(negate_input, with_kwargs=True)
    model[0].register_forward_hook(lambda module, args, output: output + shift)
    model[0].register_forward_hook(functools.partial(add_output, shift), always_call=True)
    model[1].register_full_backward_hook(lambda module, grads_in, grads_out: None)
    model.register_state_dict_post_hook(lambda module, state, prefix, metadata: None)
    return Case(model, (torch.randn(3, 8),))


@_difficult
def attributes_on_parameters():
    model = nn.Linear(8, 8)
    model.weight.tag = "frozen by recipe"
    model.weight.statistics = {"mean": torch.randn(8)}
    model.bias.partner = model.weight
    return Case(model, (torch.randn(3, 8),))


class ScaledParameter(nn.Parameter):
    """A Parameter subclass, as sharding libraries make them."""


@_difficult
def parameter_subclass():
    model = nn.Linear(8, 8)
    model.weight = ScaledParameter(model.weight.detach())
    model.bias = ScaledParameter(model.bias.detach(), requires_grad=False)
    model.bias.world_size = 4
    return Case(model, (torch.randn(3, 8),))


@_difficult
def numpy_attributes():
    rng = np.random.default_rng(0)
    model = Holder(
        small=rng.random(8, np.float32), large=rng.random((500, 500)), scalar=np.float64(0.1)
    )
    model.record = np.array([(1, 2.5)], dtype=[("index", "i4"), ("value", "f8")])
    model.fortran, model.strided = np.asfortranarray(rng.random((90, 80))), rng.random(9000)[::3]
    model.objects, model.alias = np.array([None, "a", 1.5], dtype=object), model.large
    return Case(model, (torch.randn(3, 8),), call=lambda m, x: m(x) + torch.tensor(m.small))


class Measured(np.ndarray):
    """An array that knows its unit, as numpy's guide to subclassing has it."""

    def __array_finalize__(self, obj):
        self.unit = getattr(obj, "unit", None)


@_difficult
def array_subclasses():
    rng = np.random.default_rng(0)
    model = Holder(
        matrix=rng.random((90, 80)).view(np.matrix),
        masked=np.ma.masked_less(rng.random((90, 80)), 0.5),
        record=np.rec.fromarrays([rng.random(900), np.arange(900)], names="value,index"),
        small=np.ones(3).view(Measured),
        large=rng.random((30, 40, 50)).transpose(2, 0, 1).view(Measured),
        dates=np.arange("2000-01", "2100-01", dtype="datetime64[M]"),
        text=np.array(["a", "bcd"] * 900),
    )
    model.small.unit, model.large.unit = "metre", torch.randn(3)
    model.reversed, model.broadcast = (
        model.large[::-1, ::2],
        np.broadcast_to(np.arange(9.0), (99, 9)),
    )
    return Case(model, (torch.randn(3, 8),))


@_difficult
def memory_maps():
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:  # mapped, it needs no name any more
        np.save(file, np.random.default_rng(0).random((90, 80)).T)
        file.flush()
        model = Holder(read=np.load(file.name, mmap_mode="r"), copied=np.load(file.name, "c"))
    model.copied[3] = 0
    model.rows = model.read[5:50]
    return Case(model, (torch.randn(3, 8),))


@_difficult
def shared_storage_views():
    model, flat = nn.Linear(8, 8), torch.randn(100)
    model.weight = nn.Parameter(flat[4:68].view(8, 8))
    model.bias = nn.Parameter(flat[60:68])
    model.register_buffer("tail", flat[70:100:3])
    model.transposed = flat[4:68].view(8, 8).t()
    return Case(model, (torch.randn(3, 8),))


@_difficult
def bare_storages():
    model = nn.Linear(8, 8)
    model.storage = model.weight.untyped_storage()
    model.typed = torch.randn(5)._typed_storage()
    return Case(model, (torch.randn(3, 8),))


@_difficult
def in_shared_memory():
    return Case(_mlp(8, 16, 4).share_memory(), (torch.randn(3, 8),))


@_difficult
def lazy_module():
    return Case(nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d()), call=None)


class Locked(Holder):
    """Drops its lock when pickled and makes a new one when unpickled."""

    def __init__(self):
        super().__init__(lock=threading.Lock())

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.lock = threading.Lock()


@_difficult
def custom_state():
    return Case(Locked(), (torch.randn(3, 8),))


class Slotted(nn.Module):
    """A module with a slot beside its dict; torch's own pickling would drop the slot."""

    __slots__ = ("scale",)

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.scale = torch.randn(8)

    def forward(self, x):
        return self.linear(x) * self.scale

    def __getstate__(self):
        return {**self.__dict__, "scale": self.scale}

    def __setstate__(self, state):
        self.scale = state.pop("scale")
        super().__setstate__(state)


class Shadowed(nn.Module):
    """Properties of its class lie over what is in its dict."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.__dict__["scale"] = 3.0

    @property
    def scale(self):
        return -self.__dict__["scale"]

    @property
    def training(self):
        return self.__dict__["training"]

    @training.setter
    def training(self, mode):
        self.__dict__["training"] = mode
        self.__dict__["switched"] = self.__dict__.get("switched", 0) + 1

    def forward(self, x):
        return self.linear(x) * self.scale


class Named:
    """A mixin with a property, as of the many that libraries put after `nn.Module`."""

    @property
    def name(self):
        return self.__dict__["name"]


class NamedModule(nn.Module, Named):
    """Its dict holds what a property of a later base would not let anyone set."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.__dict__["name"] = "linear"

    def forward(self, x):
        return self.linear(x)


@_difficult
def property_of_a_later_base():
    return Case(NamedModule(), (torch.randn(3, 8),))


class SelfReducing(nn.Module):
    """Says itself how it is made and what it is made with."""

    def __init__(self, width, state=None):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.load_state_dict(state or self.state_dict())

    def forward(self, x):
        return self.linear(x)

    def __reduce__(self):
        return type(self), (self.linear.in_features, self.state_dict())


@_difficult
def custom_reduce():
    return Case(SelfReducing(8), (torch.randn(3, 8),))


@_difficult
def shadowed_state():
    return Case(Shadowed(), (torch.randn(3, 8),))


@_difficult
def slotted_module():
    return Case(Slotted(), (torch.randn(3, 8),))


class SlottedPipeline:
    __slots__ = ("first", "second")

    def __init__(self, first, second):
        self.first, self.second = first, second

    def __call__(self, x):
        return self.second(self.first(x))


@_difficult
def slotted_pipeline():
    return Case(SlottedPipeline(nn.Linear(8, 8), nn.Linear(8, 4)), (torch.randn(3, 8),))


@_difficult
def frozen_parameters():
    model = _mlp(8, 16, 4)
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return Case(model, (torch.randn(3, 8),))


@_difficult
def mixed_training_flags():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.BatchNorm1d(8))
    model[1].eval()
    return Case(model, (torch.randn(3, 8),))


@_difficult
def reference_cycle():
    model = Holder(child=Holder())
    model.child.parents = [model]
    return Case(model, (torch.randn(3, 8),), call=lambda m, x: m.child.parents[0](m.child(x)))


@_difficult
def quantized_dynamic():
    net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)).eval()
    return Case(torch.ao.quantization.quantize_dynamic(net, {nn.Linear}), (torch.randn(3, 8),))


class Branching(nn.Module):
    """Arguments of every kind, for a graph."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(8, 8), nn.Parameter(torch.randn(8))

    def forward(self, x, power=2, *, shift=None):
        y = torch.relu(self.linear(x)) ** power
        return {"sum": y.sum(dim=-1), "parts": [y[:, 1:3], torch.add(y, self.scale, alpha=0.5)]}


@_difficult
def traced_graph():
    traced = torch.fx.symbolic_trace(Branching())
    x = torch.randn(3, 8)
    ShapeProp(traced).propagate(x, 2)
    traced.meta["output"] = next(iter(reversed(traced.graph.nodes)))
    dead = traced.graph.call_function(torch.ops.aten.add.Tensor, (1, 2))  # code would not trace it
    dead.meta["why"] = "a pass left it"
    traced.recompile()
    return Case(traced, (x, 2))


@_difficult
def quantized_convolution():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3)).eval()
    net = torch.ao.quantization.QuantWrapper(net)
    net.qconfig = torch.ao.quantization.default_qconfig
    prepared = torch.ao.quantization.prepare(net)
    x = torch.randn(2, 3, 8, 8)
    prepared(x)
    return Case(torch.ao.quantization.convert(prepared), (x,))


class Pipeline:
    """Two models and a vocabulary in a plain class."""

    def __init__(self, encoder, head):
        self.encoder, self.head, self.vocabulary = encoder, head, {"a": 0, "b": 1}

    def __call__(self, x):
        return self.head(self.encoder(x))


@_difficult
def pipeline():
    return Case(Pipeline(_mlp(8, 8, 8), nn.Linear(8, 4)), (torch.randn(3, 8),))


@_difficult
def dict_of_models():
    models = {"first": nn.Linear(8, 8), "second": nn.Linear(8, 4), "threshold": 0.5}
    return Case(models, (torch.randn(3, 8),), call=lambda m, x: m["second"](m["first"](x)))


@_difficult
def list_of_models():
    return Case(
        [nn.Linear(8, 8), (nn.Linear(8, 4),)],
        (torch.randn(3, 8),),
        call=lambda m, x: m[1][0](m[0](x)),
    )


@dataclass
class Ensemble:
    members: list
    weight: torch.Tensor


@_difficult
def dataclass_of_models():
    return Case(
        Ensemble([nn.Linear(8, 4), nn.Linear(8, 4)], torch.randn(2)),
        (torch.randn(3, 8),),
        call=lambda e, x: sum(w * member(x) for w, member in zip(e.weight, e.members, strict=True)),
    )


@_difficult
def one_model_two_names():
    model = nn.Linear(8, 8)
    return Case(
        {"student": model, "teacher": model},
        (torch.randn(3, 8),),
        call=lambda m, x: m["teacher"](x),
    )


@_difficult
def submodule_twice():
    block = nn.Linear(8, 8)
    return Case(nn.Sequential(block, nn.ReLU(), block), (torch.randn(3, 8),))


@_difficult
def state_dict():
    return Case(channels_last().model.state_dict(), call=None)


@_difficult
def class_by_value():
    class Local(nn.Module):
        """Importable from nowhere, so its code travels too."""

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(x).relu()

    return Case(Local(), (torch.randn(3, 8),))


@_difficult
def model_with_optimizer():
    model = nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return Case(
        {"model": model, "optimizer": optimizer},
        (torch.randn(3, 8),),
        call=lambda m, x: m["model"](x),
    )


@_difficult
def integer_and_complex_parameters():
    model = nn.ParameterDict({"phase": torch.randn(4, dtype=torch.complex64)})
    model["index"] = nn.Parameter(torch.randint(0, 9, (4,)), requires_grad=False)
    return Case(model, call=lambda m: m["phase"][m["index"] % 4])


@_difficult
def meta_model():
    return Case(nn.Linear(8, 8, device="meta"), call=None)


@_difficult
def hf_output():
    return Case(ARCHITECTURES["gpt2"]().run(), call=None)


@_difficult
def hf_hidden_states():
    case = ARCHITECTURES["bert"]()
    case.kwargs["output_hidden_states"] = True
    case.run()  # installs hooks that hold a ContextVar
    return case


@_difficult
def hf_pipeline():
    from transformers import AudioClassificationPipeline, Wav2Vec2FeatureExtractor
    from transformers import Wav2Vec2ForSequenceClassification as Classifier

    model = Classifier(Classifier.config_class(**_SPEECH)).eval()
    pipe = AudioClassificationPipeline(
        model=model, feature_extractor=Wav2Vec2FeatureExtractor(), top_k=2
    )
    return Case(pipe, (np.sin(np.arange(800, dtype=np.float32)),))


# --- architectures --------------------------------------------------------------------------------


def _text():
    return {"input_ids": torch.arange(14).reshape(2, 7) % 90 + 5}


def _text_pair():
    return {**_text(), "decoder_input_ids": _text()["input_ids"]}


def _image():
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def _text_and_image():
    return {**_text(), **_image()}


def _wave():
    return {"input_values": torch.randn(2, 400)}


def _mono():
    return {"input_values": torch.randn(1, 1, 320)}


def _spectrum():
    return {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": _text()["input_ids"]}


_SIZE = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {**_SIZE, "intermediate_size": 64, "max_position_embeddings": 64}
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_IMAGE = {**_TEXT, "image_size": 32, "patch_size": 8}
_SPEECH = {
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


def _hf(name, config, inputs=_text, dtype=torch.float32) -> Callable[[], Case]:
    """A factory of the `transformers` model class `name` in evaluation mode."""

    @_seeded
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
    "hubert": _hf("HubertModel", _SPEECH, _wave),
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
    "wav2vec2": _hf("Wav2Vec2Model", _SPEECH, _wave),
    "wavlm": _hf("WavLMModel", _SPEECH, _wave),
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


# --- layouts --------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[], Any]] = {}
_layout = _entry(LAYOUTS)

DTYPES = sorted(
    {value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str
)


def _random_bytes(dtype) -> torch.Tensor:
    """64 random bytes as a tensor of `dtype`, NaNs and all; quantised ones in two rows."""
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (64,), dtype=torch.uint8)
    if not str(dtype).startswith(("torch.qint", "torch.quint")):
        return raw.view(dtype)
    shape = [2, 32 // dtype.itemsize]
    tensor = torch._empty_affine_quantized(shape, scale=0.25, zero_point=3, dtype=dtype)
    storage = tensor.untyped_storage()
    storage.copy_(raw.untyped_storage()[: storage.nbytes()])  # sub-byte ones take fewer than 64
    return tensor


for _dtype in DTYPES:
    LAYOUTS[str(_dtype).removeprefix("torch.")] = _seeded(functools.partial(_random_bytes, _dtype))


@_layout
def channels_last_tensor():
    return torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)


@_layout
def transposed():
    return torch.randn(4, 6).t()


@_layout
def expanded():
    return torch.randn(3, 1).expand(3, 1000)


@_layout
def overlapping():
    return torch.randn(40).as_strided((6, 8), (2, 1), 3)


@_layout
def scalar():
    return torch.tensor(3.5, dtype=torch.float64)


@_layout
def empty():
    return torch.empty(0)


@_layout
def empty_with_strides():
    return torch.empty_strided((3, 0, 2), (7, 5, 1))


@_layout
def empty_slice():
    return torch.randn(10)[4:4]


@_layout
def strides_that_lead_nowhere():
    return [torch.randn(5).as_strided((1, 5), (2**40, 1)), torch.empty_strided((0, 3), (2**40, 1))]


@_layout
def slice_of_huge():
    return torch.randn(1_000_000)[500_000:500_010]


@_layout
def slices_of_one():
    base = torch.randn(100)
    return [base[10:20], base[15:25], base[90:], base, base[10:20]]


@_layout
def far_slices_of_one():
    base = torch.randn(1_000_000)
    return [base[:10], base[-10:]]


@_layout
def odd_byte_offset():
    return torch.arange(64, dtype=torch.uint8)[3:40]


@_layout
def two_dtypes_one_storage():
    base = torch.randn(16)
    return [base, base.view(torch.int32), base.view(torch.uint8)[5:9]]


@_layout
def conj_view():
    return torch.randn(5, dtype=torch.complex64).conj()


@_layout
def neg_view():
    return torch.randn(5, dtype=torch.complex64).conj().imag


@_layout
def conj_and_neg_view():
    return torch.randn(5, dtype=torch.complex64).conj()._neg_view()


@_layout
def requires_grad():
    return torch.randn(5, requires_grad=True)


def _masked():
    return torch.randn(8, 8) * (torch.rand(8, 8) > 0.6)


@_layout
def sparse_coo():
    return _masked().to_sparse()


@_layout
def sparse_coo_uncoalesced():
    return torch.sparse_coo_tensor(torch.tensor([[1, 1, 0]]), torch.randn(3), (4,))


@_layout
def sparse_over_dense():
    values = torch.randn(3)
    return [values, torch.sparse_coo_tensor(torch.tensor([[0, 1, 3]]), values, (4,))]


@_layout
def sparse_csr():
    return _masked().to_sparse_csr()


@_layout
def sparse_csc():
    return _masked().to_sparse_csc()


@_layout
def sparse_bsr():
    return _masked().to_sparse_bsr((2, 2))


@_layout
def sparse_bsc():
    return _masked().to_sparse_bsc((2, 2))


@_layout
def nested():
    return torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)])


@_layout
def nested_jagged():
    return torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=torch.jagged)


@_layout
def quantized_per_tensor():
    return torch.quantize_per_tensor(torch.randn(4, 6), 0.1, 10, torch.quint8).t()


@_layout
def quantized_per_channel():
    scales, zeros = torch.rand(4, dtype=torch.float64) + 0.1, torch.tensor([0, 1, 2, 3])
    return torch.quantize_per_channel(torch.randn(4, 6), scales, zeros, 0, torch.qint8)


@_layout
def quantized_views():
    base = torch.quantize_per_tensor(torch.randn(4, 6), 0.1, 10, torch.quint8)
    return [base, base[2:], base]


class PlainSubclass(torch.Tensor):
    """A tensor subclass with nothing of its own."""


@_layout
def subclass():
    tensor = torch.randn(4).as_subclass(PlainSubclass)
    tensor.unit = "metre"
    return tensor


@_layout
def subclass_parameter():
    return nn.Parameter(torch.randn(4).as_subclass(PlainSubclass))


class FunctionSubclass(torch.Tensor):
    """Counts the torch functions called on it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, cls):
            result.calls = getattr(args[0], "calls", 0) + 1
        return result


@_layout
def subclass_torch_function():
    return torch.randn(4).as_subclass(FunctionSubclass)


class ScaledTensor(torch.Tensor):
    """A wrapper subclass: int8 values and a scale, no storage of its own."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["values"], inner["scale"])

    def __repr__(self):
        return f"ScaledTensor({self.values!r}, {self.scale!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        plain = [a.values * a.scale if isinstance(a, cls) else a for a in args]
        return func(*plain, **(kwargs or {}))


@_layout
def subclass_torch_dispatch():
    return ScaledTensor(torch.randint(-128, 127, (3, 4), dtype=torch.int8), torch.rand(3, 1))


@_layout
def subclass_torch_dispatch_parameter():
    tensor = subclass_torch_dispatch()
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(tensor)
    return layer


@_layout
def meta():
    return torch.empty(3, 4, device="meta").t()


@_layout
def padded_rows():
    return nn.functional.pad(torch.randn(5, 7), (0, 1))[:, :7]

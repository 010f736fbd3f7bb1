"""Scripted and exported models load as they were put, their weights as views on the block."""

import io
import threading
import warnings

import pytest
import ray
import ray_zerocopy as rzc
import torch
from exact import assert_same_description, describe
from models import ARCHITECTURES, Case, large, simple, transformer
from test_memory_footprint import MODEL_NBYTES, Worker, place_in_file, print_table
from test_put import AMBIENT, ISOLATIONS
from torch import nn

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit:FutureWarning",
    "ignore:`torch.jit:DeprecationWarning",
    "ignore::torch.jit.TracerWarning",
)


class Layer(nn.Module):
    """A linear layer with a table and a counter beside its weights."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.table = torch.randn(32)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x) * self.table + self.calls


class Everything(nn.Module):
    """Tensors in every place that TorchScript allows."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Layer(), Layer()
        self.second.linear.weight = self.first.linear.weight
        self.second.table = self.first.table
        self.second.linear.bias.requires_grad_(False)
        self.norm = nn.BatchNorm1d(32).eval()
        self.conv = nn.Conv2d(1, 4, 3).to(memory_format=torch.channels_last)
        self.layers = nn.ModuleList([nn.Linear(32, 32, bias=False), nn.Identity()])
        self.register_buffer("kept", torch.randn(32))
        self.register_buffer("dropped", torch.randn(32).bfloat16(), persistent=False)
        self.register_buffer("absent", None)
        self.items = [torch.randn(32), torch.randn(32)]
        self.by_name = {"shift": torch.randn(32), "scale": torch.randn(32)}
        self.pair = (torch.randn(32), 2.5)
        self.transposed = self.layers[0].weight.detach().t()
        self.width = 32

    def forward(self, x):
        x = self.second(self.first(x)) + self.kept + self.dropped
        x = self.norm(x * self.items[0] + self.items[1] + self.by_name["shift"]) * self.pair[1]
        for layer in self.layers:
            x = layer(x)
        return x @ self.transposed + self.conv(x[None, None]).mean() + self.pair[0]

    @torch.jit.export
    def scale(self, x):
        return x * self.by_name["scale"] * self.width


class OldStyle(torch.jit.ScriptModule):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32))

    @torch.jit.script_method
    def forward(self, x):
        return x @ self.weight


def inputs():
    return torch.randn(5, 32)


def save_and_load(script):
    file = io.BytesIO()
    torch.jit.save(script, file)
    file.seek(0)
    return torch.jit.load(file)


def scripted():
    return Case(torch.jit.script(Everything()), (inputs(),))


def exports_a_method():
    return Case(scripted().model, (inputs(),), call=lambda m, x: m.scale(x))


def loaded_from_a_file():
    return Case(save_and_load(scripted().model), (inputs(),))


def traced():
    return Case(torch.jit.trace(Everything().eval(), inputs(), check_trace=False), (inputs(),))


def frozen():
    return Case(torch.jit.freeze(torch.jit.script(Everything().eval())), (inputs(),))


def old_style():
    return Case(OldStyle(), (inputs(),))


def traced_lstm():
    net, x = nn.LSTM(8, 16, num_layers=2), torch.randn(5, 2, 8)
    return Case(torch.jit.trace(net, x), (x,))


def scripted_transformer():
    case = transformer()
    return Case(torch.jit.script(case.model), case.args)


def traced_bert():
    case = ARCHITECTURES["bert"]()
    (ids,) = case.args or (case.kwargs["input_ids"],)
    return Case(torch.jit.trace(case.model.eval(), ids, strict=False), (ids,))


def quantized():
    net = torch.ao.quantization.quantize_dynamic(simple().model, {nn.Linear})
    return Case(torch.jit.script(net), simple().args)


def traced_function():
    weight = torch.randn(32, 32)
    return Case(torch.jit.trace(lambda x: x @ weight, (inputs(),)), (inputs(),))


def times(x, n: int):
    return x * n


def scripted_function():
    return Case(torch.jit.script(times), (inputs(), 3))


SCRIPTS = {
    factory.__name__: factory
    for factory in (
        *(scripted, exports_a_method, loaded_from_a_file, traced, frozen, old_style, traced_lstm),
        *(scripted_transformer, traced_bert, quantized, traced_function, scripted_function),
    )
}


def parts_of(value):
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    return value if isinstance(value, dict) else {"": value}


def constants(script):
    """The tensors in the code of all methods, except numbers that a trace turned into tensors."""
    modules = script.modules() if isinstance(script, nn.Module) else ()
    methods = [m._c._get_method(name) for m in modules for name in m._c._method_names()]
    graphs = [method.graph for method in methods or [script]]
    nodes = [node for graph in graphs for node in graph.findAllNodes("prim::Constant")]
    found = [part for node in nodes for part in parts_of(node.output().toIValue()).values()]
    return [value for value in found if isinstance(value, torch.Tensor) and value.dim()]


def attributes(script):
    """The tensors of a script, by name."""
    if isinstance(script, torch.jit.ScriptFunction):
        return {}
    found = dict(script.state_dict(keep_vars=True)) | dict(script.named_parameters())
    for path, module in script.named_modules():
        for name in torch._C.ConcreteModuleType.from_jit_type(module._c._type()).get_attributes():
            for key, part in parts_of(module._c.getattr(name)).items():
                if isinstance(part, torch.Tensor):
                    found[f"{path}.{name}.{key}"] = part
    return found


def tensors(script):
    return [*attributes(script).values(), *constants(script)]


def observe(case, script):
    """The things to compare: tensors, flags and names, then the outputs of two calls.

    In an archive of torch's, constants lose their order and, as objects, their ties.
    """
    found = describe(attributes(script))
    found["constants"] = {str(describe(constant.detach())) for constant in constants(script)}
    if isinstance(script, torch.jit.ScriptModule):
        found["methods"] = sorted(script._c._method_names())
        modules = script.named_modules()
        found["training"] = {n: m.training for n, m in modules if hasattr(m, "training")}
        found["parameters"] = [name for name, _ in script.named_parameters()]
        found["buffers"] = [name for name, _ in script.named_buffers()]
    outputs = [case.run(script), case.run(script)]
    return found, describe(outputs)


def assert_same(expected, actual):
    for one, other in zip(expected, actual, strict=True):
        assert_same_description(one, other)


def in_block(info, tensor):
    """Whether a tensor lies in the block, by the file that is mapped at its address."""
    _, inode, offset = place_in_file(tensor.data_ptr())
    first = offset - info.offset
    return inode == info.inode and 0 <= first <= first + tensor.nbytes <= info.nbytes


@pytest.fixture(params=SCRIPTS)
def case(request, cluster):
    torch.manual_seed(0)
    return SCRIPTS[request.param]()


class Reader:
    def observe(self, refs, case):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = ray.get(refs[0])
        return observe(case, loaded)


@pytest.fixture(scope="module")
def reader(start):
    return start(Reader)[0]


def test_a_script_loads_as_it_was_put(case, reader):
    ref = rzc.put(case.model)  # before the source runs, which counts its calls
    loads = [ray.get(ref), *(rzc.get(ref, isolation=isolation) for isolation in ISOLATIONS)]
    expected = observe(case, case.model)
    for loaded in loads:
        assert_same(expected, observe(case, loaded))
    case.model = None
    assert_same(expected, ray.get(reader.observe.remote([ref], case)))


def test_its_tensors_are_views_on_the_block(case):
    ref = rzc.put(case.model)
    info = rzc.inspect(ref)
    for isolation in ISOLATIONS:
        loaded = rzc.get(ref, isolation=isolation)
        assert {in_block(info, tensor) for tensor in tensors(loaded)} <= {isolation != "copy"}


def test_the_archive_holds_code_alone(cluster):
    """The skeleton does not grow with the tensors, including constants of a frozen module."""
    script = torch.jit.script(large().model)
    for model in (script, torch.jit.freeze(script), torch.jit.trace(large().model, large().args)):
        info = rzc.inspect(rzc.put(model))
        assert info.skeleton_nbytes < 20_000
        assert info.nbytes - info.padding == MODEL_NBYTES


def test_put_leaves_a_script_alone_that_is_in_use(case):
    def look():
        return describe(tensors(case.model)), [t.data_ptr() for t in tensors(case.model)]

    def call():
        while not done.is_set():
            outputs.append(case.run())

    if getattr(case.model, "training", False):
        case.model.eval()
    case.run()
    before, outputs, done = look(), [], threading.Event()
    caller = threading.Thread(target=call)
    caller.start()
    for _ in range(5):
        rzc.put(case.model)
    done.set()
    caller.join()
    assert look() == before
    assert outputs


def test_no_warning_reaches_the_caller(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ray.get(rzc.put(case.model))


def test_a_script_in_a_module_keeps_its_ties(cluster):
    inner = torch.jit.script(Layer())
    source = nn.ModuleDict({"plain": nn.Linear(32, 32), "script": inner, "again": inner})
    source["plain"].weight = inner.linear.weight
    source.alone = torch.jit.script(Layer())
    source.alone.linear.bias = inner.linear.bias
    loaded = ray.get(rzc.put({"model": source, "weight": inner.linear.weight}))
    model = loaded["model"]
    assert model["script"] is model["again"]
    assert model["script"].linear.weight is model["plain"].weight is loaded["weight"]
    assert isinstance(loaded["weight"], nn.Parameter)
    assert model.alone.linear.bias is model["script"].linear.bias
    assert_same_description(describe(source.state_dict()), describe(model.state_dict()))


def test_one_submodule_under_two_names_stays_one(cluster):
    source = torch.jit.script(nn.ModuleDict({"a": Layer(), "b": Layer()}))
    source.b = source.a
    loaded = ray.get(rzc.put(source))
    loaded.a(inputs())
    assert loaded.b.calls == 1


def test_tied_weights_stay_one(cluster):
    loaded = ray.get(rzc.put(scripted().model))
    assert loaded.first.linear.weight is loaded.second.linear.weight
    assert loaded.first.table is loaded.second.table


def test_what_was_loaded_can_be_put_again(case):
    again = ray.get(rzc.put(ray.get(rzc.put(case.model))))
    assert_same(observe(case, case.model), observe(case, again))


def test_what_was_loaded_can_be_saved(cluster):
    case = scripted()
    loaded = save_and_load(ray.get(rzc.put(case.model)))
    assert_same_description(describe(case.run()), describe(case.run(loaded)))


def test_a_write_stays_in_its_copy(cluster):
    ref = rzc.put(scripted().model)
    first, second = ray.get(ref), ray.get(ref)
    with torch.no_grad():
        first.first.linear.weight.zero_()
    assert first.second.linear.weight.count_nonzero() == 0
    assert second.first.linear.weight.count_nonzero() > 0


def test_attributes_set_from_python_survive(cluster):
    for model in (scripted().model, traced().model):
        model.config = {"labels": ["a", "b"], "prior": torch.randn(2)}
        loaded = ray.get(rzc.put(model))
        assert_same_description(describe(model.config), describe(loaded.config))

    model = scripted().model
    model.first.config = {"of": "a part"}
    assert ray.get(rzc.put(model)).first.config == {"of": "a part"}


def test_gradients_flow_as_through_the_source(cluster):
    case = scripted()
    loaded = ray.get(rzc.put(case.model))
    for model in (case.model, loaded):
        model(*case.args).square().sum().backward()
    gradients = [[p.grad for p in m.parameters()] for m in (case.model, loaded)]
    assert_same_description(*map(describe, gradients))


@pytest.mark.parametrize("ambient", AMBIENT)
@pytest.mark.parametrize("name", ["scripted", "frozen"])
def test_the_mode_of_the_caller_does_not_matter(name, ambient, cluster):
    torch.manual_seed(0)
    case = SCRIPTS[name]()
    with AMBIENT[ambient]():
        loaded = ray.get(rzc.put(case.model))
    assert_same(observe(case, case.model), observe(case, loaded))


def plus(x, n: int = 3):
    return x + n


def test_defaults_of_a_function_are_refused_by_name(cluster):
    with pytest.raises(rzc.PublishError, match=r"\['f'\].*plus\(Tensor x, int n=3\)"):
        rzc.put({"f": torch.jit.script(plus)})


# --- exported programs ----------------------------------------------------------------------------


class Net(nn.Module):
    """Tied weights, buffers of both kinds, a constant, a branch on data."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.second.weight = self.first.weight
        self.second.bias.requires_grad_(False)
        self.norm = nn.BatchNorm1d(32)
        self.register_buffer("dropped", torch.randn(32).bfloat16(), persistent=False)
        self.table = torch.randn(32)

    def forward(self, x, scale=None):
        x = self.norm(self.second(self.first(x).relu())) + self.dropped + self.table
        x = torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x * 2, (x,))
        return {"x": x if scale is None else x * scale["by"], "sum": x.sum()}


def export(model, args, **kwargs):
    return torch.export.export(model, args, **kwargs)


def exported():
    batch = {"x": {0: torch.export.Dim("batch", max=64)}}
    return export(Net().eval(), (inputs(),), dynamic_shapes=batch), (torch.randn(7, 32),), {}


def exported_in_train_mode():
    kwargs = {"scale": {"by": torch.randn(32)}}
    return export(Net().train(), (inputs(),), kwargs=kwargs), (inputs(),), kwargs


def decomposed():
    program, args, kwargs = exported()
    program = program.run_decompositions()
    program.example_inputs = None
    return program, args, kwargs


def exported_transformer():
    case = transformer()
    return export(case.model, case.args), case.args, {}


EXPORTS = {
    factory.__name__: factory
    for factory in (*(exported, exported_in_train_mode, decomposed, exported_transformer),)
}


def observe_exported(program, args, kwargs):
    """The things to compare. torch's archive names unused outputs of operators."""
    used = [node for node in program.graph.nodes if "_unused_" not in node.name]
    parts = {
        "state": program.state_dict,
        "constants": program.constants,
        "example": program.example_inputs,
        "signature": str(program.graph_signature),
        "ranges": str(program.range_constraints),
        "nodes": [(node.op, node.name, str(node.target)) for node in used],
    }
    before, module = describe(parts), program.module()
    with torch.no_grad():
        return before, describe([module(*args, **kwargs), module(*args, **kwargs)])


class ExportReader:
    def observe(self, refs, args, kwargs):
        return observe_exported(ray.get(refs[0]), args, kwargs)


@pytest.fixture(scope="module")
def export_reader(start):
    return start(ExportReader)[0]


@pytest.fixture(scope="module", params=EXPORTS)
def program(request, cluster):
    torch.manual_seed(0)
    return EXPORTS[request.param]()


def test_a_program_loads_as_it_was_put(program, export_reader):
    source, *inputs = program
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ref = rzc.put(source)
        loaded = ray.get(ref)
    theirs = export_reader.observe.remote([ref], *inputs)
    expected = observe_exported(source, *inputs)
    assert_same(expected, observe_exported(loaded, *inputs))
    assert_same(expected, ray.get(theirs))


def test_its_weights_and_those_of_its_module_are_views_on_the_block(program):
    ref = rzc.put(program[0])
    info = rzc.inspect(ref)
    for isolation in ISOLATIONS:
        loaded = rzc.get(ref, isolation=isolation)
        module = loaded.module()
        held = [*loaded.state_dict.values(), *loaded.constants.values()]
        held += [*module.parameters(), *module.buffers()]
        assert {in_block(info, tensor) for tensor in held} == {isolation != "copy"}


@pytest.mark.parametrize("ambient", AMBIENT)
def test_a_program_loads_in_every_mode(ambient, cluster):
    program, *inputs = exported_transformer()
    with AMBIENT[ambient]():
        loaded = ray.get(rzc.put(program))
    assert_same(observe_exported(program, *inputs), observe_exported(loaded, *inputs))


# --- memory ---------------------------------------------------------------------------------------


class Runner(Worker):
    """Runs a program as one runs a module."""

    def load(self, refs):
        super().load(refs)
        if isinstance(self.model, torch.export.ExportedProgram):
            self.model = self.model.module()

    def warm(self, refs):
        """Load all code: the first call of a scripted module alone takes 3 MiB for it."""
        self.load(refs)
        simple().run(self.model)


FORMS = {
    "scripted": lambda case: torch.jit.script(case.model),
    "traced": lambda case: torch.jit.trace(case.model, case.args),
    "frozen": lambda case: torch.jit.freeze(torch.jit.script(case.model)),
    "exported": lambda case: torch.export.export(case.model, case.args),
}


def test_a_worker_takes_no_memory_for_the_weights(start):
    (worker,), found = start(Runner), {}
    for form in (*FORMS.values(), *FORMS.values()):
        ray.get(worker.warm.remote([rzc.put(form(simple()))]))
    for way, form in FORMS.items():
        ref = rzc.put(form(large()))
        ray.get(worker.load.remote([ref]))
        loaded = ray.get(worker.growth.remote())
        ray.get(worker.forward.remote())
        found[way] = [loaded, ray.get(worker.growth.remote())]
        ray.get(worker.drop.remote())
    print_table("Unique set size grows by", ["after loading", "after a forward"], found)
    for loaded, called in found.values():
        assert loaded < 0.02 * MODEL_NBYTES
        assert called < 0.05 * MODEL_NBYTES

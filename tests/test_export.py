"""Adapted models as programs of their own: `torch.export`, ONNX, and the code of docs/export.md."""

import copy
import functools
import io
import re
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from conftest import spiking, tiny_llama, tiny_opt
from torch.export import Dim

from spikelora.sparsity.observe import gates, observing

pytestmark = [
    # torch.onnx copies tree specifications with a function that torch itself deprecates.
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),
    # torch.export of 2.10 and 2.11 loads a file into memory that only reads.
    pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning"),
]
GUIDE = Path(__file__).parents[1] / "docs" / "export.md"
TOLERANCE = 1e-5  # of logits; onnxruntime adds up in another order, which at these sizes makes up to 3e-7
MARGIN = 2e-6  # of v from its threshold; the two compute v up to 5e-7 apart
IDS = torch.arange(3, 31).view(2, 14)


def exportable(base, **options):
    """The base with adapters that do something, and without a cache."""
    base.config.use_cache = False
    return spiking(base, **({"v_threshold": 0.02} | options)).eval()


def batch(padding=None, shape=None):
    """Token ids and a mask; with padding the second row has five tokens less, on that side."""
    ids = IDS if shape is None else torch.arange(3, 3 + shape[0] * shape[1]).view(shape)
    mask = torch.ones_like(ids)
    if padding:
        mask[1, slice(0, 5) if padding == "left" else slice(-5, None)] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def run(model, inputs):
    """Logits of the model, and `v` `(N, r)` of each module."""
    charges = {}

    def see(gated, a, mask):
        charges[gated.module] = a / gated.gate.tau

    with observing(model, see):
        return model(**inputs).logits, charges


def run_onnx(proto, inputs):
    """Logits of an ONNX model, and in the order in which its gates run their `v` and spikes `(N, r)`."""
    proto = onnx.ModelProto.FromString(proto.SerializeToString())
    logits, comparisons = proto.graph.output[0].name, gates_of(proto)
    shown = [name for node in comparisons for name in (node.input[0], node.output[0])]
    for name, kind in zip(shown, [onnx.TensorProto.FLOAT, onnx.TensorProto.BOOL] * len(comparisons), strict=True):
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    arrays = session.run([logits, *shown], {name: tensor.numpy() for name, tensor in inputs.items()})
    values, *tensors = (torch.from_numpy(array) for array in arrays)
    return values, [v.flatten(0, -2) for v in tensors[::2]], [spikes.flatten(0, -2) for spikes in tensors[1::2]]


def gates_of(proto):
    """The comparisons `v >= v_threshold` of an ONNX model; equal thresholds are one tensor in it."""
    nodes = [node for node in proto.graph.node if node.op_type == "GreaterOrEqual"]
    return [node for node in nodes if node.input[1].endswith("v_threshold")]


def flips(model, charges, spikes, tokens):
    """By module how many elements of the tokens spike in one program and not in the other, and how many could: those
    whose `v` is within the margin of the threshold."""
    thresholds = {gated.module: gated.gate.v_threshold.detach() for gated in gates(model)}
    flipped, near = {}, {}
    for (module, v), spiked in zip(charges.items(), spikes, strict=True):
        flipped[module] = int(((v >= thresholds[module]) ^ spiked)[tokens].sum())
        near[module] = int(((v - thresholds[module]).abs() < MARGIN)[tokens].sum())
    return {m: n for m, n in flipped.items() if n}, {m: n for m, n in near.items() if n}


@functools.cache
def exported(make):
    """A model, and the program and the ONNX model of it, which nobody changes: each export takes seconds."""
    model = exportable(make(), learn_threshold=True, learn_tau=True)
    program = torch.export.export(model.get_base_model(), (), batch("left"))
    return model, program, torch.onnx.export(program, dynamo=True, verbose=False).model_proto


@pytest.mark.parametrize("make", [tiny_opt, tiny_llama])
def test_the_exported_program_gives_the_same_logits(make):
    model, program, _ = exported(make)
    inputs = batch("left")

    torch.testing.assert_close(program.module()(**inputs).logits, run(model, inputs)[0], rtol=0, atol=TOLERANCE)


def test_the_exported_program_takes_other_shapes_and_outlives_a_file():
    """Here of LLaMA; the guide's code does the same with OPT."""
    model, sizes = exportable(tiny_llama()), {0: Dim("batch", max=8), 1: Dim("tokens", min=2, max=64)}
    program = torch.export.export(
        model.get_base_model(),
        (),
        batch(),
        dynamic_shapes={"input_ids": sizes, "attention_mask": sizes},
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    module = torch.export.load(file).module()

    for inputs in (batch("right"), batch(shape=(3, 9)), batch(shape=(1, 40))):
        torch.testing.assert_close(module(**inputs).logits, run(model, inputs)[0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("make", [tiny_opt, tiny_llama])
def test_onnxruntime_gives_the_same_spikes_and_logits(make):
    model, _, proto = exported(make)
    for padding in (None, "left", "right"):
        inputs = batch(padding)
        # A row of attention that sees nothing, as that of a padded token on the left, torch and ONNX fill differently,
        # in the base model alike: nobody reads it.
        tokens = inputs["attention_mask"].flatten().bool()
        expected, charges = run(model, inputs)
        actual, _, spikes = run_onnx(proto, inputs)

        assert 0.1 < torch.cat([s.flatten() for s in spikes]).float().mean() < 0.9
        assert flips(model, charges, spikes, tokens) == ({}, {})
        torch.testing.assert_close(actual.flatten(0, 1)[tokens], expected.flatten(0, 1)[tokens], rtol=0, atol=TOLERANCE)


def test_a_spike_on_the_threshold_may_flip_and_shows_at_its_token_alone():
    shared, _, proto = exported(tiny_llama)
    model, proto, inputs = copy.deepcopy(shared), onnx.ModelProto.FromString(proto.SerializeToString()), batch()
    _, charges = run(model, inputs)
    _, onnx_charges, _ = run_onnx(proto, inputs)
    last, v = list(charges.items())[-1]  # what it gates reaches no other gate
    onnx_v, gate = onnx_charges[-1], {gated.module: gated.gate for gated in gates(model)}[last]
    token, rank = divmod(int((v.abs() * (v != onnx_v)).argmax()), v.shape[1])
    assert v[token, rank] != onnx_v[token, rank]
    threshold = torch.maximum(v, onnx_v)[token, rank].reshape(1)  # one of the two reaches it
    with torch.no_grad():
        gate.v_threshold.copy_(threshold)
    gates_of(proto)[-1].input[1] = "its own v_threshold"
    proto.graph.initializer.append(onnx.numpy_helper.from_array(threshold.numpy(), "its own v_threshold"))
    expected, charges = run(model, inputs)
    actual, _, spikes = run_onnx(proto, inputs)

    assert flips(model, charges, spikes, slice(None)) == ({last: 1}, {last: 1})
    errors = (actual - expected).flatten(0, 1).abs().amax(1)
    assert errors[token] > 100 * TOLERANCE
    errors[token] = 0
    assert errors.max() < TOLERANCE


@pytest.mark.parametrize("make", [tiny_opt, tiny_llama])
def test_what_is_exported_has_the_gate(make):
    model, program, proto = exported(make)
    inputs, n_gates = batch(), len(gates(model))
    ungated = exportable(make(), v_threshold=-1e9)
    expected = run(ungated, inputs)[0]

    assert sum(node.target is torch.ops.aten.ge.Tensor for node in program.graph.nodes) >= n_gates
    assert len(gates_of(proto)) == n_gates
    assert (program.module()(**inputs).logits - expected).abs().max() > 0.01
    assert (run_onnx(proto, inputs)[0] - expected).abs().max() > 0.01


def test_the_guide_s_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, inputs = exportable(tiny_opt()), batch(shape=(2, 14))
    names = {"model": model}
    for code in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL):
        exec(code, names)

    others = batch(shape=(3, 9))
    expected = run(model, others)[0]
    program = torch.export.load("spiking.pt2").module()
    torch.testing.assert_close(program(**others).logits, expected, rtol=0, atol=TOLERANCE)
    proto = onnx.load("spiking.onnx")
    assert len(gates_of(proto)) == len(gates(model))
    torch.testing.assert_close(run_onnx(proto, others)[0], expected, rtol=0, atol=TOLERANCE)
    expected = run(model, inputs)[0]
    torch.testing.assert_close(torch.from_numpy(names["logits"]), expected, rtol=0, atol=TOLERANCE)

"""Models with spiking adapters in threads, in pickles, in other dtypes, on other devices and in shared memory."""

import copy
import io
import os
import pickle
import threading

import pytest
import torch
from conftest import spiking, tiny_opt

from spikelora import SparsityMeter
from spikelora.method.gate import SpikeGate

TOKENS = torch.arange(3, 31).view(2, 14)
V_THRESHOLD = 0.7  # not what the configuration has


@pytest.fixture
def model(opt):
    """With a threshold of its own in the first module."""
    model = spiking(opt, task_type="CAUSAL_LM").eval()
    with torch.no_grad():
        gates(model)[0].v_threshold.fill_(V_THRESHOLD)
    return model


def gates(model):
    return [module for module in model.modules() if isinstance(module, SpikeGate)]


def neurons(model):
    return {name: tensor for name, tensor in model.state_dict().items() if ".lora_gate." in name}


def batch(number):
    """One of several that differ in tokens, in length and in padding."""
    tokens = torch.randint(3, 100, (2, 6 + 2 * number), generator=torch.Generator().manual_seed(number))
    mask = torch.ones_like(tokens)
    mask[1, : 2 + number] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def in_threads(work, count):
    """Call `work(number)` in as many threads at once; an error in one is raised here."""
    start, errors = threading.Barrier(count), []

    def run(number):
        try:
            start.wait()
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.compatibility("Reliability", "threads with one adapter and different inputs")
def test_threads_get_the_results_of_their_own_inputs(model):
    expected = [model(**batch(number)).logits for number in range(4)]

    def work(number):
        with torch.no_grad():
            for _ in range(15):
                assert torch.equal(model(**batch(number)).logits, expected[number])

    in_threads(work, 4)


@pytest.mark.compatibility("Reliability", "a sparsity meter on a model that runs in threads")
def test_a_meter_counts_what_all_threads_run(model):
    with torch.no_grad(), SparsityMeter(model) as meter:
        for number in range(4):
            for _ in range(10):
                model(**batch(number))
    expected = meter.report()

    def work(number):
        with torch.no_grad():
            for _ in range(10):
                model(**batch(number))

    with SparsityMeter(model) as meter:
        in_threads(work, 4)
    assert meter.report() == expected
    assert expected.modules["model.decoder.layers.0.fc1"].tokens == 10 * sum(
        int(batch(number)["attention_mask"].sum()) for number in range(4)
    )


@pytest.mark.compatibility("Reliability", "training in threads")
def test_gradients_of_threads_add_up(model):
    def gradients():
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    model(TOKENS).logits.square().sum().backward()
    once = gradients()
    lock = threading.Lock()

    def work(number):
        loss = model(TOKENS).logits.square().sum()
        with lock:  # torch does not add to one gradient from several threads at once
            loss.backward()

    in_threads(work, 2)
    assert once
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, 2 * once[name])


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.compatibility("Reliability", "pickle, `copy.deepcopy`, `torch.save` of the model")
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded], ids=range(3)
)
def test_copies_are_equal_and_of_their_own(model, duplicate):
    other = duplicate(model)
    assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)
    assert [(name, type(module)) for name, module in other.named_modules()] == [
        (name, type(module)) for name, module in model.named_modules()
    ]
    expected = model(TOKENS).logits
    with torch.no_grad():
        for gate in gates(other):
            gate.v_threshold.fill_(-9)
    assert not torch.equal(other(TOKENS).logits, expected)
    assert torch.equal(model(TOKENS).logits, expected)
    # A copy is trained and saved like its original.
    assert {n for n, p in other.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.compatibility("Reliability", "a model of `torch.save` in a process that only imports spikelora")
def test_torch_load_in_a_new_process(model, tmp_path, fresh):
    torch.save(model, tmp_path / "model.pt")
    torch.save(model(TOKENS).logits, tmp_path / "logits.pt")
    code = """
import sys, torch, spikelora
model = torch.load(sys.argv[1] + "/model.pt", weights_only=False)
expected = torch.load(sys.argv[1] + "/logits.pt")
print(torch.equal(model(torch.arange(3, 31).view(2, 14)).logits, expected))
model.save_pretrained(sys.argv[1] + "/adapter")
"""
    run = fresh(code, tmp_path)
    assert (run.stdout, run.returncode) == ("True\n", 0), run.stderr
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.compatibility("Reliability", "`half`, `bfloat16`, `double`, `to` of the model", note="gates stay float32")
@pytest.mark.parametrize(
    "cast",
    [
        lambda model: model.half(),
        lambda model: model.bfloat16(),
        lambda model: model.double(),
        lambda model: model.to(torch.bfloat16),
        lambda model: model.to("cpu", torch.float16),
        lambda model: model.type(torch.bfloat16),
        lambda model: model.to(torch.bfloat16).float(),
    ],
    ids=range(7),
)
def test_casts_leave_the_gates(model, cast):
    before = copy.deepcopy(neurons(model))
    logits = model(TOKENS).logits
    cast(model)
    after = neurons(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == torch.float32 for name in before)
    torch.testing.assert_close(model(TOKENS).logits.float(), logits, atol=0.1, rtol=0)


@pytest.mark.compatibility("Reliability", "moving to a GPU and back")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_and_back(model):
    logits, before = model(TOKENS).logits, copy.deepcopy(neurons(model))
    model.cuda()
    torch.testing.assert_close(model(TOKENS.cuda()).logits.cpu(), logits, atol=1e-3, rtol=0)
    model.cpu()
    assert torch.equal(model(TOKENS).logits, logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in neurons(model).items())


@pytest.mark.compatibility("Reliability", "`share_memory`")
def test_shared_memory_is_seen_by_other_processes(model):
    logits = model(TOKENS).logits
    model.share_memory()
    assert all(parameter.is_shared() for parameter in model.parameters())
    assert torch.equal(model(TOKENS).logits, logits)
    gate = gates(model)[0]
    child = os.fork()
    if child == 0:
        gate.v_threshold.data.fill_(0.25)
        os._exit(0)
    os.waitpid(child, 0)
    assert gate.v_threshold.item() == 0.25


@pytest.mark.compatibility("Reliability", "the meta device")
def test_on_the_meta_device_shapes_come_out(model):
    model.set_attn_implementation("eager")  # as transformers 5.17 reads values of a mask for the other one
    model.to("meta")
    assert model(TOKENS.to("meta")).logits.shape == (2, 14, 100)
    assert "v_threshold=nan" in repr(model)
    with pytest.raises(NotImplementedError, match="meta tensor"):
        model.to("cpu")


@pytest.mark.compatibility(
    "Reliability", "`to_empty` from the meta device", note="gates begin as configured; weights have to be loaded"
)
def test_to_empty_gives_the_gates_of_the_configuration(model):
    state, logits = copy.deepcopy(model.state_dict()), model(TOKENS).logits
    model.to("meta").to_empty(device="cpu")
    values = {name: tensor.item() for name, tensor in neurons(model).items()}
    assert {value for name, value in values.items() if name.endswith("v_threshold")} == {torch.tensor(0.1).item()}
    assert {value for name, value in values.items() if name.endswith("tau")} == {2.0}
    model.load_state_dict(state)
    assert torch.equal(model(TOKENS).logits, logits)
    assert gates(model)[0].v_threshold.item() == torch.tensor(V_THRESHOLD).item()


def test_to_empty_knows_the_thresholds_of_single_modules():
    model = spiking(tiny_opt(), threshold_pattern={"fc1": 0.3}, tau=3.0).to("meta").to_empty(device="cpu")
    for name, tensor in neurons(model).items():
        expected = 3.0 if name.endswith("tau") else 0.3 if "fc1" in name else 0.1
        assert tensor.item() == pytest.approx(expected), name


def replica_of(model):
    """As `nn.DataParallel` makes them for each GPU: what autograd copied from parameters are attributes."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in copies.items():
        for name, child in module._modules.items():
            setattr(replica, name, copies.get(child))
        for name, p in module._parameters.items():
            setattr(replica, name, None if p is None else p.view_as(p))
    return copies[model]


@pytest.mark.parametrize("learned", [(), ("learn_threshold",), ("learn_tau",), ("learn_threshold", "learn_tau")])
def test_a_replica_of_data_parallel_is_the_model(learned):
    model = spiking(tiny_opt(), **dict.fromkeys(learned, True))
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    results = []
    for each in (model, replica_of(model)):
        loss = each(TOKENS, labels=TOKENS).loss
        results.append((loss, *torch.autograd.grad(loss, list(found.values()))))
    torch.testing.assert_close(*results)
    assert sum("lora_gate" in name for name in found) == len(learned) * len(gates(model))

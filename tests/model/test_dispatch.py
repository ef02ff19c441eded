"""The dispatch table and its switch, and whole models: fast paths, the reference, and Transformers' model."""

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

import hf_segformer
from hf_segformer import SegFormerConfig, SegFormerForSemanticSegmentation, set_fast_paths
from hf_segformer.dispatch_segformer import record_fast_paths, run_fast
from tests.support.fast_paths import assert_near, fast, ran, recorded, reference, switched
from tests.support.stock import close, stock_names, stock_pair
from tests.support.tiny import TINY

STILL = {"classifier_dropout_prob": 0.0, "drop_path_rate": 0.0}


def make_model(dtype=torch.float32, **options):
    """A model whose every layer matters; as it is initialised, attention is all but even."""
    torch.manual_seed(0)
    model = SegFormerForSemanticSegmentation(SegFormerConfig(**{**TINY, "num_labels": 5, **options}))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def batch_of(dtype=torch.float32, size=(70, 41)):
    labels = torch.randint(0, 5, (2, *size))
    labels[:, :4] = 255
    return torch.randn(2, 3, *size, dtype=dtype), labels


def step(model, images, labels):
    """Loss, logits, every gradient and buffer after one forward and backward; the model itself stays as it is."""
    model = copy.deepcopy(model)
    torch.manual_seed(7)
    outputs = model(images, labels=labels)
    outputs.loss.backward()
    found = {"loss": outputs.loss.detach(), "logits": outputs.logits.detach()}
    found |= {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    return found | dict(model.named_buffers())


def assert_equal_steps(found, expected, tolerance):
    """Gradients that are mathematically zero (such as those of keys' biases) are the rounding of larger ones."""
    assert found.keys() == expected.keys()
    largest = max(value.abs().max() for name, value in expected.items() if name.startswith("gradient"))
    for name, value in expected.items():
        rounding = 128 * torch.finfo(found["loss"].dtype).eps * largest
        assert (found[name] - value).abs().max() <= tolerance * value.abs().max() + rounding, name


# The switch


def test_the_switch_is_the_environment_variable(monkeypatch):
    logits = torch.randn(1, 3, 4, 6)

    def is_fast():
        with record_fast_paths() as calls:
            hf_segformer.upsample_argmax(logits, (8, 12))
        return ran(calls) == {"cpu_bands"}

    monkeypatch.delenv("HF_SEGFORMER_PLAIN", raising=False)
    assert is_fast()
    set_fast_paths(False)
    assert os.environ["HF_SEGFORMER_PLAIN"] == "1"
    assert not is_fast()
    set_fast_paths(True)
    assert is_fast()
    for value, enabled in (("1", False), ("0", True), ("", True), ("true", False)):
        monkeypatch.setenv("HF_SEGFORMER_PLAIN", value)
        assert is_fast() == enabled
    assert hf_segformer.set_fast_paths is set_fast_paths


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(1, 2, 2, 2, dtype=torch.int64), "the first tensor does not hold floats"),
        (torch.zeros(1, 2, 2, 2, device="meta"), "there is no fast path for tensors on meta"),
        (torch.zeros(1, 2, 2, 2).to_sparse(), "a tensor is not dense"),
        (torch.zeros(1, 2, 2, 2, dtype=torch.complex64), "the first tensor does not hold floats"),
        (torch.zeros(1, 2, 2, 2).as_subclass(type("Named", (torch.Tensor,), {})), "a tensor is a Named"),
    ],
    ids=["integers", "meta", "sparse", "complex", "subclass"],
)
def test_only_dense_float_tensors_of_a_cpu_are_fast(tensor, reason):
    with switched(True) as calls:
        assert run_fast("upsample_argmax", None, tensor, (4, 4), False) is NotImplemented
        assert run_fast("upsample_argmax", None, torch.zeros(1, 2, 2, 2).bfloat16(), (4, 4), False).shape == (1, 4, 4)
    assert calls == [("upsample_argmax", "", reason), ("upsample_argmax", "cpu_bands", "")]


@pytest.mark.parametrize("training", [False, True])
def test_the_switch_decides_which_implementations_run(training):
    model, (images, labels) = make_model(**STILL).train(training), batch_of()
    found = []
    for chosen in (reference, fast):
        with chosen() as calls:
            found.append(step(model, images, labels)["loss"])
            with torch.no_grad():
                model.eval()(images)
            model.train(training)
    assert ran(calls) == {"cpu_strips", "cpu_bands"}
    assert_near(found[1], found[0], 1e-5)
    for chosen, enabled in ((fast, "1"), (reference, "0")):
        with pytest.raises(AssertionError), chosen():  # noqa: PT012
            os.environ["HF_SEGFORMER_PLAIN"] = enabled
            step(model, images, labels)


FRESH = """
import torch
from hf_segformer import upsample_argmax
from hf_segformer.dispatch_segformer import record_fast_paths
with record_fast_paths() as calls:
    upsample_argmax(torch.zeros(1, 3, 4, 4), (8, 8))
print(calls[0][1] or "reference")
"""


@pytest.mark.parametrize(("value", "expected"), [("1", "reference"), ("0", "cpu_bands")])
@pytest.mark.slow
def test_the_environment_of_a_fresh_process_decides(value, expected):
    environment = {**os.environ, "HF_SEGFORMER_PLAIN": value}
    done = subprocess.run([sys.executable, "-c", FRESH], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [expected]


# Threads and modes


def test_a_default_device_does_not_move_internal_tensors(images):
    """`torch.device(...)` as a context says where new tensors go; a model on the CPU computes there."""
    model = SegFormerForSemanticSegmentation(SegFormerConfig(**TINY, num_labels=5))
    labels = torch.randint(0, 5, images[:, 0].shape)
    with torch.device("meta"):
        loss = model(images, labels=labels).loss
        loss.backward()
        with torch.no_grad():
            logits = model.eval()(images).logits
            found, probabilities = hf_segformer.upsample_argmax(logits, labels.shape[1:], with_probability=True)
    assert loss.isfinite()
    assert torch.equal(found, hf_segformer.upsample_argmax(logits, labels.shape[1:]))
    assert probabilities.min() > 0


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("training", [False, True])
def test_a_model_leaves_the_number_of_threads_alone(training, number, num_threads):
    num_threads(number)
    model, (images, labels) = make_model(**STILL).train(training), batch_of()
    with fast():
        step(model, images, labels)
        with pytest.raises(ValueError, match="labels hold 77"):
            model(images, labels=labels.masked_fill(labels == 1, 77))
    assert torch.get_num_threads() == number


def test_models_run_in_several_threads_at_once(num_threads):
    num_threads(2)
    model = make_model(torch.float64, **STILL).eval()
    images, labels = torch.randn(4, 3, 70, 41, dtype=torch.float64), torch.randint(0, 5, (4, 70, 41))
    with reference(), torch.no_grad():
        expected = [model(images[i : i + 1], labels=labels[i : i + 1]) for i in range(4)]
    found, errors = {}, []

    def call(index):
        here = slice(index, index + 1)
        try:
            for _ in range(4):
                with torch.no_grad():  # a mode of the thread
                    found[index] = model(images[here], labels=labels[here])
        except BaseException as error:
            errors.append(error)

    with switched(True):
        threads = [threading.Thread(target=call, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    for index, right in enumerate(expected):
        assert_near(found[index].logits, right.logits, 1e-9)
        assert_near(found[index].loss, right.loss, 1e-9)
    assert torch.get_num_threads() == 2
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [2], "a thread that starts afterwards has the number of threads that was set"


def _loss_in_child(queue, model, images, labels):
    torch.set_num_threads(1)  # as a DataLoader's worker does
    loss = model(images, labels=labels).loss
    loss.backward()
    queue.put((loss.item(), torch.get_num_threads()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12 and up
def test_a_forked_child_works_after_its_parent_has():
    """A DataLoader's workers are such children."""
    model, (images, labels) = make_model(**STILL).train(), batch_of()
    with fast():
        expected = copy.deepcopy(model)(images, labels=labels).loss.item()
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=_loss_in_child, args=(queue, model, images, labels))
        child.start()
        try:
            loss, number = queue.get(timeout=30)
            child.join(timeout=30)
        finally:
            child.kill()
    assert child.exitcode == 0
    assert loss == pytest.approx(expected, rel=1e-5)
    assert number == 1


# Whole models


@pytest.mark.parametrize("size", [(70, 41), (32, 96), (33, 35)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize(
    "options", [STILL, {"drop_path_rate": 0.3, "classifier_dropout_prob": 0.2}], ids=["still", "random"]
)
def test_a_training_step_equals_the_reference(options, dtype, tolerance, size):
    """Random numbers too are drawn alike. Float32: a ReLU's input near 0 may fall on either side of it."""
    model, (images, labels) = make_model(dtype, **options).train(), batch_of(dtype, size)
    with reference():
        expected = step(model, images, labels)
    with fast():
        found = step(model, images, labels)
    assert_equal_steps(found, expected, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_inference_equals_the_reference(dtype, tolerance):
    model = make_model(dtype).eval()
    for size in ((70, 41), (32, 96), (8, 9), (130, 33)):
        images = torch.randn(2, 3, *size, dtype=dtype)
        with torch.inference_mode():
            with reference():
                expected = model(images, output_hidden_states=True, output_attentions=True)
            with fast():
                found = model(images, output_hidden_states=True, output_attentions=True)
                assert_near(model(images).logits, expected.logits, tolerance)
        assert_near(found.logits, expected.logits, tolerance)
        for ours, right in zip(
            (*found.hidden_states, *found.attentions), (*expected.hidden_states, *expected.attentions), strict=True
        ):
            assert_near(ours, right, tolerance)


def losses_of_training(dtype, num_steps=20):
    model = make_model(dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    labels = (torch.arange(48) // 10).expand(2, 64, 48)  # stripes, which the first channel shows
    images = torch.randn(2, 3, 64, 48, dtype=dtype)
    images[:, 0] += labels
    torch.manual_seed(11)
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = model(images, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_twenty_training_steps_equal_the_reference(dtype, tolerance):
    """With dropout and drop path. Float32: what differs by rounding grows from step to step, as AdamW divides by a
    gradient's size, so that keys' biases, whose gradient is nothing but rounding, move by whole steps either way;
    measured 1e-6.
    """
    curves = []
    for chosen in (reference, fast):
        torch.manual_seed(5)
        with chosen():
            curves.append(losses_of_training(dtype))
    assert curves[1] == pytest.approx(curves[0], rel=tolerance)
    assert curves[0][-1] < 0.9 * curves[0][0], "nothing was learned"


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_loss_and_gradients_are_those_of_transformers(tmp_path, dtype, tolerance, enabled):
    stock, ours = stock_pair(tmp_path)
    stock, ours = stock.to(dtype).train(), ours.to(dtype).train()
    images, labels = batch_of(dtype, (66, 97))
    expected = stock(images, labels=labels)
    expected.loss.backward()
    stock.save_pretrained(tmp_path / "names")  # Transformers renames on disk only: read the order from there
    with fast() if enabled else reference():
        outputs = ours(images, labels=labels)
        outputs.loss.backward()
    close(outputs.loss, expected.loss, tolerance)
    close(outputs.logits, expected.logits, tolerance)
    parameters = dict(ours.named_parameters())
    largest = max(parameter.grad.abs().max() for parameter in stock.parameters())
    for parameter, name in stock_names(stock):
        scale = largest if dtype == torch.float32 else parameter.grad.abs().max().clamp(min=1e-3 * largest)
        assert (parameters[name].grad - parameter.grad).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.slow
def test_the_whole_model_compiles_into_one_graph(training):
    torch.compiler.reset()
    model, (images, labels) = make_model(**STILL).train(training), batch_of(size=(64, 48))
    with reference():
        expected = copy.deepcopy(model)(images, labels=labels)
    with recorded():
        found = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")(images, labels=labels)
        found.loss.backward()
    assert_near(found.loss, expected.loss, 1e-5)
    assert_near(found.logits.detach(), expected.logits.detach(), 2e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    model, (images, labels) = make_model(torch.float64, drop_path_rate=0.2).train(), batch_of(torch.float64)
    with reference():
        expected = step(model, images, labels)
    enable = "activation_checkpointing_enable"  # its name from Transformers 5.18 on
    enable = getattr(model, enable if hasattr(model, enable) else "gradient_checkpointing_enable")
    enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    with fast():
        found = step(model, images, labels)
    assert_equal_steps(found, expected, 1e-9)


def test_autocast_is_as_accurate_as_the_reference():
    model, (images, labels) = make_model(**STILL).train(), batch_of()

    def mixed():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return step(model, images, labels)

    with reference():
        expected, usual = step(model, images, labels), mixed()
    with switched(True):
        found = mixed()
    for name in ("loss", "logits", "gradient of decode_head.linear_fuse.weight"):
        assert found[name].dtype == usual[name].dtype
        error = (found[name].float() - expected[name]).norm()
        assert error <= 2 * (usual[name].float() - expected[name]).norm() + 1e-3 * expected[name].norm(), name


def test_a_model_is_copied_and_pickled_after_calls():
    model, (images, labels) = make_model(**STILL).train(), batch_of()
    with fast():
        model(images, labels=labels).loss.backward()
        model.eval()
        with torch.no_grad():
            expected = model(images).logits
            for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                assert torch.equal(again(images).logits, expected)


@pytest.mark.parametrize("training", [False, True])
def test_parameters_changed_through_data_are_used_at_once(training):
    model, (images, labels) = make_model(torch.float64, **STILL).train(training), batch_of(torch.float64)
    with fast():
        first = step(model, images, labels)
        for parameter in model.parameters():
            parameter.data = parameter.data * 1.1
            parameter.data.add_(0.01)
        found = step(model, images, labels)
    with reference():
        expected = step(model, images, labels)
    assert_equal_steps(found, expected, 1e-9)
    assert (found["logits"] - first["logits"]).abs().max() > 1e-3

"""The minimum cut against brute force, and what may be a candidate at all."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from cloud.split.graph import Flow, Op
from cloud.split.shortlist import minimum_cut, shortlist, single_tensor_cuts


@st.composite
def flows(draw: st.DrawFn) -> Flow:
    """A random DAG: tensor 0 is the input, op i reads some earlier tensors and gives tensor i."""
    count = draw(st.integers(2, 8))
    ops = []
    for at in range(1, count + 1):
        reads = draw(st.lists(st.integers(0, at - 1), min_size=1, max_size=3, unique=True))
        cost = draw(st.integers(1, 50))
        ops.append(
            Op(
                at - 1,
                draw(st.sampled_from(["Conv", "Add", "Relu"])),
                tuple(f"t{one}" for one in reads),
                (f"t{at}",),
                cost,
            )
        )
    elements = {f"t{at}": draw(st.integers(1, 80)) for at in range(count + 1)}
    read = {name for op in ops for name in op.inputs}
    outputs = tuple(op.outputs[0] for op in ops if op.outputs[0] not in read)
    return Flow(("t0",), outputs, tuple(ops), elements)


def closed_sets(flow: Flow) -> list[frozenset[int]]:
    producer = flow.producer()
    every = range(len(flow.ops))
    sets = [frozenset(chosen) for size in range(len(flow.ops) + 1) for chosen in itertools.combinations(every, size)]
    return [one for one in sets if all(producer.get(name, at) in one for at in one for name in flow.ops[at].inputs)]


def price(flow: Flow, device: frozenset[int], slowdown: float) -> float:
    work = sum(op.cost * (slowdown if at in device else 1) for at, op in enumerate(flow.ops))
    producer, consumers = flow.producer(), flow.consumers()
    crossing = [
        name for name, readers in consumers.items()
        if (name not in producer or producer[name] in device) and any(reader not in device for reader in readers)
    ]  # fmt: skip
    return work + sum(flow.elements[name] for name in crossing)


@settings(max_examples=150, deadline=None)
@given(flow=flows(), slowdown=st.integers(1, 12))
def test_the_minimum_cut_is_the_best_of_all_closed_sets(flow: Flow, slowdown: int) -> None:
    found = minimum_cut(
        flow,
        lambda at: slowdown * flow.ops[at].cost,
        lambda at: flow.ops[at].cost,
        lambda name: float(flow.elements[name]),
    )
    every = closed_sets(flow)
    assert found in every
    assert price(flow, found, slowdown) == min(price(flow, one, slowdown) for one in every)


@settings(max_examples=100, deadline=None)
@given(flow=flows(), slowdown=st.integers(1, 12))
def test_no_minimum_cut_crosses_what_the_runtime_fuses(flow: Flow, slowdown: int) -> None:
    glued = flow.glued()
    found = minimum_cut(
        flow,
        lambda at: slowdown * flow.ops[at].cost,
        lambda at: flow.ops[at].cost,
        lambda name: float(flow.elements[name]),
        glued,
    )
    assert not set(flow.live(found)) & glued - set(flow.outputs)


@settings(max_examples=100, deadline=None)
@given(flow=flows())
def test_single_tensor_cuts_are_all_of_them_and_nothing_else(flow: Flow) -> None:
    wanted = {
        one for one in closed_sets(flow)
        if 0 < len(one) < len(flow.ops) and len(flow.live(one)) == 1 and one == flow.ancestors(flow.live(one)[0])
        and flow.live(one)[0] not in (*flow.glued(), *flow.outputs, *flow.inputs)
    }  # fmt: skip
    assert set(single_tensor_cuts(flow)) == wanted


@settings(max_examples=100, deadline=None)
@given(flow=flows(), most=st.integers(1, 4))
def test_the_shortlist_is_nested_closed_and_ever_smaller_on_the_wire(flow: Flow, most: int) -> None:
    cuts = shortlist(flow, most)
    every = set(closed_sets(flow))
    assert len(cuts) <= most
    for cut in cuts:
        assert cut.prefix in every
        assert not cut.raw
        assert not set(cut.tensors) & set(flow.inputs)
    for before, after in itertools.pairwise(cuts):
        assert before.prefix < after.prefix
        assert after.elements < before.elements


def chain(*kinds: str) -> Flow:
    ops = tuple(Op(at, kind, (f"t{at}",), (f"t{at + 1}",), 100.0) for at, kind in enumerate(kinds))
    return Flow(("t0",), (f"t{len(kinds)}",), ops, {f"t{at}": 1000 // (at + 1) for at in range(len(kinds) + 1)})


def test_no_cut_between_a_convolution_and_what_is_fused_into_it() -> None:
    assert chain("Conv", "BatchNormalization", "Relu", "Conv", "Flatten").glued() == {"t1", "t2"}


def test_a_quantized_model_is_cut_at_its_codes_only() -> None:
    flow = chain(
        "QuantizeLinear", "DequantizeLinear", "Conv", "Relu", "QuantizeLinear", "DequantizeLinear", "Conv", "Flatten"
    )
    assert [cut.tensors for cut in shortlist(flow) if cut.share < 0.8] == [("t5",)]


def test_the_input_in_another_dress_is_still_the_input() -> None:
    flow = chain("Transpose", "Sub", "Div", "Conv", "Relu", "Conv", "Flatten")
    assert flow.disguised() == {"t0", "t1", "t2", "t3"}
    assert shortlist(flow)[0].tensors == ("t5",)


def test_a_declared_minimum_cut_is_kept_even_where_it_pays_nothing() -> None:
    flow = Flow(("t0",), ("t3",), chain("Conv", "Conv", "Conv").ops, {"t0": 10, "t1": 50, "t2": 900, "t3": 1})
    assert ("t2",) in [cut.tensors for cut in shortlist(flow, keep="t2")]


def test_a_deeper_cut_that_is_larger_is_listed_where_it_may_be_the_only_private_one() -> None:
    sizes = {"t0": 100, "t1": 90, "t2": 40, "t3": 20, "t4": 60, "t5": 80, "t6": 1}
    flow = Flow(("t0",), ("t6",), chain(*["Conv"] * 6).ops, sizes)
    assert [cut.tensors[0] for cut in shortlist(flow)] == ["t1", "t2", "t3"]
    assert [cut.tensors[0] for cut in shortlist(flow, deep=True)] == ["t1", "t2", "t3", "t4", "t5"]
    assert [cut.tensors[0] for cut in shortlist(flow, 2, deep=True)] == ["t1", "t5"]

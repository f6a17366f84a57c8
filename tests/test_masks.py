"""Groups, selection and masks, on their invariants."""

import numpy as np
import pytest
import torch
from torch import nn

from common import masks
from common.cmi import layer_cmi
from common.errors import InputError


@pytest.mark.parametrize(("units", "groups"), [(500, 250), (300, 100), (10, 3), (7, 7), (5, 1)])
def test_groups_are_contiguous_even_and_complete(units, groups):
    labels = masks.contiguous_groups(units, groups)
    sizes = np.bincount(labels)
    assert len(labels) == units
    assert len(sizes) == groups
    assert sizes.max() - sizes.min() <= 1
    assert (np.diff(labels) >= 0).all()


@pytest.mark.parametrize("shape", [(3, 4), (4,), (4, 1), (8, 9), (), None])
def test_ranks_that_are_not_one_value_for_every_block_are_refused(rng, shape):
    """Of a rule of the reader's own: also blocks by parents, by weights, or of one group only; tensors will do."""
    blocks = {"weight": masks.Blocks(masks.contiguous_groups(8, 4), masks.contiguous_groups(9, 3))}
    values = torch.from_numpy(rng.random((4, 3)))
    assert masks.select_blocks({"weight": values}, blocks, 0.5, [1])["weight"].shape == (4, 3)
    with pytest.raises(InputError, match=r"ranks of weight: .*; legal: one value for every block, \(4, 3\)"):
        masks.select_blocks({} if shape is None else {"weight": rng.random(shape)}, blocks, 0.05, [1])


@pytest.mark.parametrize("groups", [0, 11])
def test_impossible_numbers_of_groups_are_refused(groups):
    with pytest.raises(InputError, match="legal: 1 to 10"):
        masks.contiguous_groups(10, groups)


def test_units_that_correlate_share_a_group(rng):
    """Noisy copies of eight signals, of either sign, in any order, are found again; classes stay single."""
    signal = rng.permutation(np.repeat(np.arange(8), 3))
    units = rng.normal(size=(500, 8))[:, signal] * rng.choice([-5, 1], 24) + 0.1 * rng.normal(size=(500, 24))
    labels = masks.correlated_groups(units, 8)
    assert all(len(set(labels[signal == k])) == 1 for k in range(8))
    blocks = masks.Blocks(np.arange(10), masks.contiguous_groups(24, 8), 9, 64)
    found = masks.correlated_blocks(blocks, rng.normal(size=(500, 10)), units)
    assert found.child_groups.tolist() == list(range(10))
    assert (found.parent_groups == labels).all()
    assert found.cost.sum() == 10 * 24 * 9 * 64


@pytest.mark.parametrize(("units", "groups"), [(500, 250), (30, 7), (7, 7), (5, 1)])
def test_correlated_groups_are_even_and_complete(rng, units, groups):
    """Also where units are constant."""
    activations = rng.normal(size=(50, units)) * (rng.random(units) < 0.7)
    sizes = np.bincount(masks.correlated_groups(activations, groups))
    assert len(sizes) == groups
    assert sizes.sum() == units
    assert sizes.max() - sizes.min() <= 1


def test_blocks_count_groups_as_scores_do(net, rng):
    """Whatever integers label them: the mask of scores is that of labels from 0 without gaps."""
    children, parents = rng.permutation(np.arange(10) % 3), rng.permutation(np.arange(6) % 2)
    units = rng.normal(size=(50, 6))
    outputs, found = units @ rng.normal(size=(6, 10)) + rng.normal(size=(50, 10)), []
    for first, step, kind in ((0, 1, np.int64), (1, 1, np.int32), (-1, 1, np.int64), (3, 7, np.uint64)):
        labels = [(first + step * groups).astype(kind) for groups in (children, parents)]
        scores, blocks = layer_cmi(outputs, units, *labels, estimator="gaussian"), masks.Blocks(*labels, 9)
        kept = masks.select([scores], [blocks.weights], 0.5, [1])[0]
        mask = masks.Mask.of_blocks({"conv.weight": kept}, {"conv.weight": blocks}, net)
        magnitude = masks.rank("magnitude", net, {"conv.weight": blocks}, None)["conv.weight"]
        found.append((mask["conv.weight"], torch.from_numpy(magnitude)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


@pytest.mark.parametrize("kept", [np.ones((10, 6), bool), np.ones((3, 2)), np.ones(3, bool)])
def test_what_is_kept_is_a_truth_value_for_every_block(net, kept):
    """Of a larger array a corner would count, of numbers other than 0 and 1 anything."""
    blocks = masks.contiguous_blocks(net, "conv.weight", 2, 3)
    with pytest.raises(InputError, match=r"kept blocks of conv.weight: .*; legal: \(3, 2\) of bool"):
        masks.Mask.of_blocks({"conv.weight": kept}, {"conv.weight": blocks}, net)


def random_layers(rng, ties=False):
    shapes = [(5, 7), (30, 20), (1, 9)]
    scores = [rng.integers(0, 3, s).astype(float) if ties else rng.normal(size=s) for s in shapes]
    return scores, [rng.integers(1, 50, s) for s in shapes]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.962, 1])
def test_pruned_share_is_reached_and_exceeded_by_less_than_a_block(rng, share, ties):
    scores, weights = random_layers(rng, ties)
    kept = masks.select(scores, weights, share, [1, 1, 1])
    pruned = sum(w[~k].sum() for w, k in zip(weights, kept, strict=True))
    total = sum(w.sum() for w in weights)
    assert 0 <= pruned - share * total < max(w.max() for w in weights)


def test_blocks_are_ranked_over_all_layers_together(rng):
    scores, weights = random_layers(rng)
    kept = masks.select(scores, weights, 0.4, [1, 1, 1])
    highest_pruned = max(s[~k].max() for s, k in zip(scores, kept, strict=True) if not k.all())
    lowest_kept = min(s[k].min() for s, k in zip(scores, kept, strict=True) if k.any())
    assert highest_pruned < lowest_kept


def test_no_layer_exceeds_its_maximum(rng):
    scores, weights = random_layers(rng)
    scores[1] -= 100  # the layer that would be pruned whole
    most = [1, 0.55, 1]
    kept = masks.select(scores, weights, 0.5, most)
    for w, k, limit in zip(weights, kept, most, strict=True):
        assert w[~k].sum() <= limit * w.sum()
    assert sum(w[~k].sum() for w, k in zip(weights, kept, strict=True)) >= 0.5 * sum(w.sum() for w in weights)


def test_a_sparsity_beyond_the_maxima_is_refused(rng):
    with pytest.raises(InputError, match="`upper_prune_limit` allows at most"):
        masks.select(*random_layers(rng), 0.9, [0.5, 0.5, 0.5])


@pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.99, 1])
@pytest.mark.parametrize("shape", [(20, 50), (1, 9), (7, 3)])
def test_balanced_selection_reaches_the_share_within_a_block(rng, share, shape):
    weights = rng.integers(1, 20, shape)
    pruned = ~masks.select_balanced(rng.normal(size=shape), weights, share)
    assert -1e-6 <= weights[pruned].sum() - share * weights.sum() < weights.max()


def test_balanced_selection_covers_groups_before_it_repeats_them(rng):
    """100 blocks of 20 x 50: each child group 5, each parent group 2; 10 blocks: different ones throughout."""
    weights = np.full((20, 50), 6)
    for count, per_child, per_parent in ((100, 5, 2), (10, 1, 1), (37, 2, 1)):
        kept = masks.select_balanced(rng.normal(size=(20, 50)), weights, 1 - count / 1000)
        assert kept.sum() == count
        assert kept.sum(1).max() <= per_child
        assert kept.sum(0).max() <= per_parent


def test_balanced_selection_takes_the_highest_scores_it_may(rng):
    """With parts that never bind it is the ordinary selection; the highest block is always kept."""
    scores = np.arange(20.0)[None]
    assert np.flatnonzero(masks.select_balanced(scores, np.ones((1, 20)), 0.75)[0]).tolist() == [15, 16, 17, 18, 19]
    scores = rng.normal(size=(8, 8))
    assert masks.select_balanced(scores, np.ones((8, 8)), 0.9).ravel()[scores.argmax()]


@pytest.mark.parametrize("criterion", ["cmi", "random", "magnitude"])
def test_balanced_selection_keeps_the_layers_shares(net, rng, criterion):
    blocks = {
        "conv.weight": masks.contiguous_blocks(net, "conv.weight", 6, 10),
        "final.weight": masks.contiguous_blocks(net, "final.weight", 10, 4),
    }
    scores = {key: rng.random(b.weights.shape) for key, b in blocks.items()}
    ranks, like = masks.rank(criterion, net, blocks, scores), None if criterion == "cmi" else scores
    plain, balanced = (
        masks.select_blocks(ranks, blocks, 0.6, [0.9, 0.9], like=like, balanced=balanced) for balanced in (False, True)
    )
    for key, block in blocks.items():
        assert block.weights[balanced[key]].sum() == pytest.approx(block.weights[plain[key]].sum(), abs=9)


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize(("balanced", "control"), [(True, False), (False, True), (True, True)])
def test_no_layer_exceeds_its_maximum_where_blocks_differ_in_size(net, rng, balanced, control, within):
    """Blocks that are spread out, or a control's, are others than those by which the limit was met."""
    blocks = {key: masks.contiguous_blocks(net, key, 4, 3) for key in ("conv.weight", "final.weight")}
    earlier = {key: torch.rand(net.get_parameter(key).shape) > 0.2 for key in blocks} if within else {}
    for _ in range(20):
        ranks, like = ({key: rng.random((3, 4)) for key in blocks} for _ in range(2))
        like = like if control else None
        kept = masks.select_blocks(ranks, blocks, 0.45, [0.5, 0.6], like, balanced, earlier)
        mask = masks.Mask.of_blocks(kept, blocks, net, within=earlier)
        pruned = mask.pruned_by_layer()
        assert pruned["conv.weight"] <= 50
        assert pruned["final.weight"] <= 60
        largest = max(block.weights.max() for block in blocks.values())
        total = sum(kept.numel() for kept in mask.values())
        assert abs(mask.percent_pruned() / 100 - 0.45) * total < 3 * largest


@pytest.mark.parametrize(
    ("key", "kept", "message"),
    [
        ("final.weight", torch.ones(4, 10), "no tensor of bool"),
        ("final.weight", np.ones((4, 10), bool), "no tensor of bool"),
        ("final.weight", torch.ones(4, 9, dtype=torch.bool), r"is \(4, 9\); legal: \(4, 10\)"),
        ("final.bias", torch.ones(4, dtype=torch.bool), "no such layer"),
        ("other.weight", torch.ones(4, 10, dtype=torch.bool), "no such layer"),
    ],
)
def test_a_mask_made_by_hand_is_refused_if_it_is_none(net, key, kept, message):
    """An own rule may return one; of a bias it was a traceback after all training."""
    with pytest.raises(InputError, match=f"{key}.* {message}"):
        masks.Mask({key: kept}).apply(net)


def test_cmi_magnitude_by_hand(net):
    """sqrt(score) * mean magnitude; negative scores count as none."""
    blocks = {"final.weight": masks.contiguous_blocks(net, "final.weight", 5, 4)}
    with torch.no_grad():
        net.final.weight.copy_(torch.arange(1.0, 41).reshape(4, 10))
    scores = {"final.weight": np.ones((4, 5))}
    scores["final.weight"][3, 4] = -1
    scores["final.weight"][0, 0] = 1e8
    scores["final.weight"][1, 3] = 1e4
    kept = masks.select_blocks(masks.rank("cmi-magnitude", net, blocks, scores), blocks, 0.75, [1.0])
    assert np.argwhere(kept["final.weight"]).tolist() == [[0, 0], [1, 3], [3, 1], [3, 2], [3, 3]]


@pytest.mark.parametrize(
    "choose",
    [
        lambda scores, weights: masks.select([scores], [weights], 0.5, [1]),
        lambda scores, weights: masks.select_balanced(scores, weights, 0.5),
    ],
)
def test_nan_is_refused(choose):
    with pytest.raises(InputError, match="NaN"):
        choose(np.array([[np.nan]]), np.ones((1, 1), int))


@pytest.mark.parametrize("share", [np.nan, 50, -0.1])
def test_shares_that_are_none_are_refused(rng, share):
    scores, weights = rng.normal(size=(4, 5)), np.ones((4, 5), int)
    for choose in (
        lambda: masks.select([scores], [weights], share, [1]),
        lambda: masks.select([scores], [weights], 0.5, [share]),
        lambda: masks.select_balanced(scores, weights, share),
    ):
        with pytest.raises(InputError, match=f"a share of weights is {share:g}; legal: 0 to 1"):
            choose()


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint64, np.int8, np.int64, np.float16, np.float32])
def test_scores_of_any_numeric_type_select_the_same(rng, kind):
    scores, weights = rng.permutation(20).reshape(4, 5), np.ones((4, 5), int)
    for choose in (
        lambda scores: masks.select([scores], [weights], 0.75, [1])[0],
        lambda scores: masks.select_balanced(scores, weights, 0.75),
    ):
        assert (choose(scores.astype(kind)) == choose(scores.astype(float))).all()
    kept = masks.select_balanced(np.arange(20).reshape(4, 5).astype(kind), weights, 0.75)
    assert kept.ravel()[19]  # the highest
    assert not kept.ravel()[0]


def test_infinite_scores_are_the_first_and_the_last(rng):
    scores, weights = rng.normal(size=(4, 5)), np.ones((4, 5), int)
    scores[[0, 1, 2], [0, 1, 2]], scores[3, :4] = np.inf, -np.inf
    for kept in (masks.select([scores], [weights], 0.8, [1])[0], masks.select_balanced(scores, weights, 0.8)):
        assert kept[[0, 1, 2], [0, 1, 2]].all()
        assert not kept[3, :4].any()


def test_cmi_magnitude_of_unsigned_and_infinite_scores(net):
    blocks = {"final.weight": masks.contiguous_blocks(net, "final.weight", 5, 4)}
    with torch.no_grad():
        net.final.weight[0, :2] = 0
    scores = {"final.weight": np.arange(200, 220, dtype=np.uint8).reshape(4, 5)}
    found = masks.rank("cmi-magnitude", net, blocks, scores)["final.weight"]
    magnitude = blocks["final.weight"].mean_magnitude(net.final.weight)
    np.testing.assert_allclose(found, np.sqrt(np.arange(200.0, 220).reshape(4, 5)) * magnitude, rtol=1e-12)
    infinite = masks.rank("cmi-magnitude", net, blocks, {"final.weight": np.full((4, 5), np.inf)})["final.weight"]
    assert infinite[0, 0] == 0  # a block without weights carries nothing
    assert np.isinf(infinite).sum() == 19


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 10, 3)
        self.norm = nn.BatchNorm2d(10)
        self.final = nn.Linear(10, 4)

    def forward(self, x):
        return self.final(self.norm(self.conv(x)).mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def masked(net, sparsity=0.7, criterion="magnitude", scores=None, seed=0):
    """Blocks, and the mask that a criterion makes; a control takes the layers' shares from the scores."""
    blocks = {
        "conv.weight": masks.contiguous_blocks(net, "conv.weight", 4, 3),
        "final.weight": masks.contiguous_blocks(net, "final.weight", 5, 1, last="final.weight"),
    }
    ranks, like = masks.rank(criterion, net, blocks, scores, seed), None if criterion == "cmi" else scores
    kept = masks.select_blocks(ranks, blocks, sparsity, [1, 1], like=like)
    return blocks, masks.Mask.of_blocks(kept, blocks, net)


def test_last_layer_keeps_its_classes_as_groups(net):
    blocks, _ = masked(net)
    assert blocks["final.weight"].weights.shape == (4, 5)
    assert blocks["conv.weight"].weights.sum() == 6 * 10 * 9


def test_a_mask_covers_whole_blocks_with_every_tap(net):
    blocks, mask = masked(net)
    groups = blocks["conv.weight"]
    for j in range(3):
        for i in range(4):
            block = mask["conv.weight"][groups.child_groups == j][:, groups.parent_groups == i]
            assert block.all() or not block.any()


def test_mean_magnitude_is_the_literal_mean(net):
    blocks, _ = masked(net)
    groups = blocks["conv.weight"]
    weight = net.conv.weight.detach().numpy()
    expected = weight[groups.child_groups == 2][:, groups.parent_groups == 1]
    assert groups.mean_magnitude(net.conv.weight)[2, 1] == pytest.approx(np.abs(expected).mean())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_no_masked_weight_grows_back(net, optimizer):
    """Under momentum and weight decay, from weights and momenta that are not zero."""
    opt = {
        "sgd": torch.optim.SGD(net.parameters(), 0.5, momentum=0.9, weight_decay=0.1, nesterov=True),
        "adam": torch.optim.Adam(net.parameters(), 0.5, weight_decay=0.1),
    }[optimizer]

    def step():
        opt.zero_grad()
        net(torch.randn(8, 6, 5, 5)).square().sum().backward()
        opt.step()

    step()
    _, mask = masked(net)
    mask.hold(net, opt)
    for _ in range(5):
        step()
        for key, kept in mask.items():
            weight = net.get_parameter(key)
            assert (weight[~kept] == 0).all()
            assert (weight[kept] != 0).all()
            assert not torch.signbit(weight[~kept]).any()


@pytest.mark.parametrize("change", [{"dtype": torch.float64}, {"memory_format": torch.channels_last}])
def test_no_masked_weight_grows_back_where_the_network_is_converted_later(net, change):
    opt = torch.optim.SGD(net.parameters(), 0.5, weight_decay=0.1)
    _, mask = masked(net)
    mask.hold(net, opt)
    images = torch.randn(8, 6, 5, 5).to(**change)
    net.to(**change)(images).square().sum().backward()
    opt.step()
    for key, kept in mask.items():
        assert torch.equal(net.get_parameter(key) != 0, kept)


def test_controls_prune_each_layer_as_the_scores_do(net, rng):
    scores = {"conv.weight": rng.normal(size=(3, 4)) + 1, "final.weight": rng.normal(size=(4, 5))}
    shares = {}
    for criterion in ("cmi", "random", "magnitude"):
        _, mask = masked(net, 0.5, criterion, scores=scores)
        shares[criterion] = {key: float(1 - m.float().mean()) for key, m in mask.items()}
    for criterion in ("random", "magnitude"):
        assert shares[criterion]["conv.weight"] == pytest.approx(shares["cmi"]["conv.weight"], abs=12 * 9 / 540)
        assert shares[criterion]["final.weight"] == pytest.approx(shares["cmi"]["final.weight"], abs=2 / 40)


def test_random_choice_depends_on_the_seed_alone(net):
    first, again, other = (masked(net, 0.5, "random", seed=s)[1] for s in (0, 0, 1))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)


class TestFurtherPruning:
    """A second mask lies within the first: what was pruned stays so, and counts."""

    @pytest.fixture(params=[(10, 5), (3, 2)], ids=["same groups", "other groups"])
    def second(self, net, request):
        """The first mask, of a third of both layers, and blocks for the next, whose groups may cut across its."""
        first = masks.Mask.of_blocks(*self.choose(net, self.blocks(net, 6, 10, 10), 0.3)[::-1], net)
        return first, self.blocks(net, 6 if request.param[0] == 10 else 4, *request.param)

    @staticmethod
    def blocks(net, parents, children, final):
        return {
            "conv.weight": masks.contiguous_blocks(net, "conv.weight", parents, children),
            "final.weight": masks.contiguous_blocks(net, "final.weight", final, 4),
        }

    @staticmethod
    def choose(net, blocks, share, **options):
        ranks = masks.rank("random", net, blocks, None, seed=len(options))
        return blocks, masks.select_blocks(ranks, blocks, share, [1, 1], **options)

    @pytest.mark.parametrize("options", [{}, {"balanced": True}, {"like": True}])
    def test_once_pruned_stays_pruned_and_counts(self, net, second, options):
        first, blocks = second
        if options.get("like"):
            options = {"like": masks.rank("magnitude", net, blocks, None)}
        kept = self.choose(net, blocks, 0.6, within=first, **options)[1]
        mask = masks.Mask.of_blocks(kept, blocks, net, within=first)
        for key in first:
            assert not (mask[key] & ~first[key]).any()
            whole = torch.from_numpy(blocks[key].expand(kept[key]))
            expected = first[key] & whole.reshape(whole.shape + (1,) * (first[key].ndim - 2))
            assert torch.equal(mask[key], expected)
        largest = max(block.weights.max() for block in blocks.values())
        assert 0 <= mask.percent_pruned() / 100 * 580 - 0.6 * 580 < largest * len(blocks)

    def test_the_share_that_is_gone_may_be_asked_again_but_not_less(self, net, second):
        first, blocks = second
        share = first.percent_pruned() / 100
        kept = self.choose(net, blocks, share, within=first)[1]
        again = masks.Mask.of_blocks(kept, blocks, net, within=first)
        assert all(torch.equal(again[key], first[key]) for key in first)
        with pytest.raises(InputError, match=r"20 % pruned: 3\d\.\d\d % are pruned already"):
            self.choose(net, blocks, 0.2, within=first)

    def test_a_layer_beyond_its_maximum_stays_as_it_is(self, net, second):
        first, blocks = second
        ranks = masks.rank("random", net, blocks, None)
        kept = masks.select_blocks(ranks, blocks, 0.5, [1, 0.1], within=first)
        mask = masks.Mask.of_blocks(kept, blocks, net, within=first)
        assert torch.equal(mask["final.weight"], first["final.weight"])

    def test_layers_that_are_not_named_again_stay_pruned(self, net, second):
        first, blocks = second
        blocks = {"conv.weight": blocks["conv.weight"]}
        kept = masks.select_blocks(masks.rank("random", net, blocks, None), blocks, 0.9, [1], within=first)
        mask = masks.Mask.of_blocks(kept, blocks, net, within=first)
        assert torch.equal(mask["final.weight"], first["final.weight"])
        assert mask.pruned_by_layer()["conv.weight"] >= 90


def test_sparsity_is_the_mask_s(net):
    """Not that of weights that happen to be 0."""
    _, mask = masked(net)
    mask.apply(net)
    with torch.no_grad():
        net.conv.weight[mask["conv.weight"]] = 0
    report = masks.sparsity_report(net, mask)
    pruned = sum(int((~m).sum()) for m in mask.values())
    assert report["pruned_percent_masked_layers"] == pytest.approx(100 * pruned / (540 + 40))
    assert report["pruned_percent_network"] == report["pruned_percent_masked_layers"]  # all weights are in them
    by_layer = {key: 100 * (~kept).float().mean().item() for key, kept in mask.items()}
    assert report["pruned_percent_by_layer"] == pytest.approx(by_layer, rel=1e-5)
    assert report["kept_weights_that_are_0"] == int(mask["conv.weight"].sum())


def test_nothing_is_pruned_of_a_dense_network(net):
    report = masks.sparsity_report(net, masks.Mask.of_checkpoint({}, net))
    assert report["pruned_percent_masked_layers"] == report["pruned_percent_network"] == 0


def test_memory_is_the_papers():
    """fc2 of the dense MLP: 0.537 MiB in the paper, which is random weights to a compressor."""
    torch.manual_seed(0)
    assert masks.memory([nn.Linear(500, 300)]) == pytest.approx(0.537, rel=0.02)
    assert masks.memory([nn.BatchNorm2d(100)]) == 0


def test_memory_of_a_single_number():
    one, scalar = (nn.ParameterList([torch.ones(shape)]) for shape in (1, ()))
    assert masks.memory([scalar]) == masks.memory([one]) > 0

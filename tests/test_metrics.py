"""Scores of probabilities equal scikit-learn's and torchmetrics', and obey their laws."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    brier_score_loss,
    log_loss,
    roc_auc_score,
    roc_curve,
    top_k_accuracy_score,
)
from torchmetrics.functional.classification import (
    binary_auroc,
    multiclass_accuracy,
    multiclass_calibration_error,
)

from blr import metrics

EXAMPLE = torch.tensor(
    [[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.25, 0.3, 0.45], [0.05, 0.9, 0.05]],
    dtype=torch.float64,
)
LABELS = torch.tensor([1, 1, 2, 0])


def classifier(N=503, K=7, seed=0, sharpness=1.5):
    """Logits of an over-confident classifier, and labels drawn from a flatter distribution."""
    rng = np.random.default_rng(seed)
    f = rng.normal(size=(N, K)) * sharpness
    p = np.exp(0.6 * f) / np.exp(0.6 * f).sum(1, keepdims=True)
    y = np.array([rng.choice(K, p=row) for row in p])
    return torch.tensor(f), torch.tensor(y)


FS, YS = classifier()
PS = FS.softmax(-1)
SCORES = [
    metrics.accuracy,
    metrics.nll,
    metrics.brier,
    metrics.ece,
    metrics.mce,
]


# ---- accuracy, likelihood, Brier ----------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2, 5, 7])
def test_accuracy_is_that_of_torchmetrics_and_scikit_learn(top_k):
    ours = metrics.accuracy(PS, YS, top_k=top_k)
    theirs = multiclass_accuracy(PS, YS, num_classes=7, top_k=top_k, average="micro").item()
    assert ours == pytest.approx(theirs, abs=1e-7)
    if top_k < 7:  # scikit-learn warns that all classes are always right
        assert ours == top_k_accuracy_score(YS, PS, k=top_k)


def test_a_tie_goes_to_the_lower_class_as_in_argmax():
    tied = torch.full((2, 4), 0.25)
    assert metrics.accuracy(tied, [0, 3]) == 0.5
    assert metrics.accuracy(tied, [1, 2], top_k=2) == 0.5
    assert metrics.accuracy(tied, [3, 3], top_k=3) == 0.0
    assert metrics.reliability(tied, [0, 3]).accuracy.nansum() == 0.5


def test_nll_is_the_log_loss_of_scikit_learn_and_the_cross_entropy_of_torch():
    assert metrics.nll(PS, YS) == pytest.approx(log_loss(YS, PS.numpy()), rel=1e-12)
    expected = torch.nn.functional.cross_entropy(FS, YS).item()
    assert metrics.nll(FS, YS, logits=True) == pytest.approx(expected, rel=1e-12)


def test_nll_of_certain_mistakes_is_infinite_in_probabilities_and_finite_in_logits():
    assert metrics.nll([[1.0, 0.0]], [1]) == math.inf
    assert metrics.nll(torch.tensor([[900.0, 0.0]]), [1], logits=True) == 900.0
    # Classes that a model rules out may have the logit −∞.
    assert metrics.nll([[-math.inf, 0.0, 0.0]], [2], logits=True) == pytest.approx(math.log(2))


def test_brier_is_the_sum_over_classes_as_in_scikit_learn():
    theirs = brier_score_loss(YS, PS.numpy(), labels=np.arange(7))
    assert metrics.brier(PS, YS) == pytest.approx(theirs, rel=1e-12)
    by_hand = (0.01 + 0.09 + 0.04 + 0.25 + 0.49 + 0.04 + 0.0625 + 0.09 + 0.3025) + (
        0.95**2 + 0.9**2 + 0.05**2
    )
    assert metrics.brier(EXAMPLE, LABELS) == pytest.approx(by_hand / 4, rel=1e-12)


def test_half_of_brier_is_the_convention_of_scikit_learn_for_two_classes():
    p, y = PS[:, 0], (YS == 0).long()
    assert metrics.brier(p, y, half=True) == pytest.approx(brier_score_loss(y, p), rel=1e-12)
    assert metrics.brier(p, y) == 2 * metrics.brier(p, y, half=True)


def test_brier_of_ignorance_and_of_certain_mistakes():
    assert metrics.brier(torch.full((3, 5), 0.2).double(), [0, 1, 4]) == pytest.approx(1 - 1 / 5)
    assert metrics.brier(torch.eye(3), [1, 2, 0]) == 2
    assert metrics.brier(torch.eye(3), [0, 1, 2]) == 0


def test_brier_keeps_its_digits_where_predictions_are_nearly_certain():
    p = torch.tensor([[1 - 2e-6, 2e-6]], dtype=torch.float32)
    assert metrics.brier(p, [0]) == pytest.approx(2 * (2e-6) ** 2, rel=0.05)


# ---- calibration --------------------------------------------------------------------------------


@pytest.mark.parametrize("num_bins", [1, 10, 15, 20])
@pytest.mark.parametrize("sharpness", [0.3, 1.5, 3.0])
def test_calibration_errors_are_those_of_torchmetrics(num_bins, sharpness):
    f, y = classifier(seed=1, sharpness=sharpness)
    p = f.softmax(-1)
    assert p.float().max() < 1
    for ours, norm in [(metrics.ece, "l1"), (metrics.mce, "max")]:
        theirs = multiclass_calibration_error(p, y, num_classes=7, n_bins=num_bins, norm=norm)
        assert ours(p, y, num_bins=num_bins) == pytest.approx(theirs.item(), abs=2e-6)


@pytest.mark.parametrize(("adaptive", "strategy"), [(False, "uniform"), (True, "quantile")])
def test_the_bins_are_those_of_scikit_learn(adaptive, strategy):
    # With 500 examples no quantile is an example: scikit-learn's bins are closed on the right.
    p, y = PS[:500], YS[:500]
    r = metrics.reliability(p, y, num_bins=12, adaptive=adaptive)
    confidence, predicted = p.max(-1)
    share, mean = calibration_curve(predicted == y, confidence, n_bins=12, strategy=strategy)
    filled = r.count > 0
    np.testing.assert_allclose(r.accuracy[filled], share, rtol=1e-12)
    np.testing.assert_allclose(r.confidence[filled], mean, rtol=1e-12)
    assert r.count.sum() == 500


def test_certainty_is_a_bin_of_its_own_in_torchmetrics_and_in_the_last_one_here():
    p, y = torch.tensor([[1.0, 0.0], [0.95, 0.05]]), torch.tensor([1, 0])
    theirs = multiclass_calibration_error(p, y, num_classes=2, n_bins=10).item()
    assert theirs == pytest.approx((1.0 + 0.05) / 2)
    assert metrics.ece(p, y, num_bins=10) == pytest.approx((1.95 - 1) / 2)


def test_calibration_by_hand():
    # Bins [0, ½) and [½, 1]: confidence .45 right; .5, .7, .9 with one right of three.
    r = metrics.reliability(EXAMPLE, LABELS, num_bins=2)
    assert r.edges.tolist() == [0.0, 0.5, 1.0]
    assert r.count.tolist() == [1, 3]
    np.testing.assert_allclose(r.confidence, [0.45, 0.7])
    np.testing.assert_allclose(r.accuracy, [1.0, 1 / 3])
    gaps = np.array([0.55, 0.7 - 1 / 3])
    assert r.ece == metrics.ece(EXAMPLE, LABELS, num_bins=2)
    assert r.ece == pytest.approx((gaps * [1, 3]).sum() / 4, rel=1e-12)
    assert metrics.mce(EXAMPLE, LABELS, num_bins=2) == r.mce == pytest.approx(0.55, rel=1e-12)


def test_bins_are_closed_on_the_left_and_certainty_is_in_the_last():
    r = metrics.reliability([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0]], [0, 0, 0], num_bins=4)
    assert r.count.tolist() == [0, 0, 1, 2]
    assert r.confidence[:2].isnan().all() and r.accuracy[:2].isnan().all()
    assert r.confidence[3] == 0.875


def test_adaptive_bins_share_the_examples_equally():
    r = metrics.reliability(PS[:500], YS[:500], num_bins=10, adaptive=True)
    assert r.count.tolist() == [50] * 10
    assert (r.edges.diff() > 0).all()


def test_adaptive_bins_keep_equal_confidences_together():
    p = torch.tensor([[0.9, 0.1]] * 6 + [[0.6, 0.4]] * 2)
    y = torch.tensor([0, 1, 0, 0, 1, 0, 0, 1])
    for order in (torch.arange(8), torch.arange(8).flip(0)):
        r = metrics.reliability(p[order], y[order], num_bins=3, adaptive=True)
        assert sorted(r.count.tolist())[-2:] == [2, 6]
        assert r.ece == pytest.approx((6 * (0.9 - 4 / 6) + 2 * 0.1) / 8, abs=1e-6)
    certain = torch.eye(2)[[0, 0, 1]]
    assert metrics.ece(certain, [0, 1, 1], adaptive=True) == pytest.approx(1 / 3)


# ---- out of distribution ------------------------------------------------------------------------


def test_auroc_is_that_of_scikit_learn_and_torchmetrics_with_ties():
    rng = np.random.default_rng(3)
    inside, outside = rng.integers(2, 12, 301) / 12, rng.integers(0, 10, 173) / 12
    labels = np.r_[np.ones(301, int), np.zeros(173, int)]
    scores = np.r_[inside, outside]
    ours = metrics.auroc(inside, outside)
    assert ours == pytest.approx(roc_auc_score(labels, scores), rel=1e-12)
    theirs = binary_auroc(torch.tensor(scores), torch.tensor(labels)).item()
    assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("recall", [0.07, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("ties", [False, True])
def test_false_positive_rate_is_read_off_the_roc_curve(recall, ties):
    rng = np.random.default_rng(4)
    inside, outside = rng.normal(1, 1, 100), rng.normal(0, 1, 61)
    if ties:
        inside, outside = inside.round(), outside.round()
    labels = np.r_[np.ones(100), np.zeros(61)]
    fpr, tpr, _ = roc_curve(labels, np.r_[inside, outside], drop_intermediate=False)
    expected = fpr[tpr >= recall - 1e-12].min()
    ours = metrics.false_positive_rate(inside, outside, recall=recall)
    assert ours == pytest.approx(expected, rel=1e-12)


def test_detection_by_confidence_and_by_entropy():
    inside, outside = PS, classifier(201, 7, seed=5, sharpness=0.1)[0].softmax(-1)
    assert metrics.auroc(metrics.confidence(inside), metrics.confidence(outside)) > 0.95
    assert metrics.auroc(-metrics.entropy(inside), -metrics.entropy(outside)) > 0.95
    same = metrics.auroc(metrics.confidence(inside), metrics.confidence(inside))
    assert same == 0.5


def test_confidence_and_entropy_are_those_of_torch():
    torch.testing.assert_close(metrics.confidence(PS), PS.max(-1).values)
    expected = torch.distributions.Categorical(logits=FS).entropy()
    torch.testing.assert_close(metrics.entropy(PS), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(metrics.entropy(FS, logits=True), expected, rtol=1e-12, atol=0)
    assert metrics.entropy([[1.0, 0.0], [0.5, 0.5]]).tolist() == [0.0, math.log(2)]


# ---- what may be passed -------------------------------------------------------------------------


@pytest.mark.parametrize("score", SCORES, ids=lambda f: f.__name__)
def test_logits_arrays_and_lists_give_the_same(score):
    expected = score(PS, YS)
    assert isinstance(expected, float)
    assert score(FS, YS, logits=True) == pytest.approx(expected, rel=1e-12)
    assert score(PS.numpy(), YS.numpy()) == expected
    assert score(PS.tolist(), YS.tolist()) == expected
    assert score(PS.clone().requires_grad_(), YS.to(torch.uint8)) == expected
    assert score(PS.float(), YS) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accepted_and_loses_nothing_more(dtype):
    p, f = PS.to(dtype), FS.to(dtype)
    assert metrics.brier(p, YS) == pytest.approx(metrics.brier(PS, YS), rel=1e-2)
    assert metrics.nll(f, YS, logits=True) == metrics.nll(f.float(), YS, logits=True)


def test_many_examples_in_float32_are_added_without_loss():
    p = torch.tensor([[0.7, 0.3]]).expand(200_000, 2)
    expected = 1 - p[0, 0].double().item()
    assert metrics.ece(p, torch.zeros(200_000, dtype=torch.long)) == pytest.approx(
        expected, rel=1e-12
    )


def test_a_probability_that_rounding_lifts_above_one_counts_as_one():
    p = torch.tensor([1 + 1e-6, 1.0])
    assert metrics.nll(p, [1, 1]) == metrics.brier(p, [1, 1]) == 0


def test_scores_of_examples_have_no_gradient():
    p = PS.clone().requires_grad_()
    assert not metrics.confidence(p).requires_grad and not metrics.entropy(p).requires_grad


@pytest.mark.parametrize("score", SCORES, ids=lambda f: f.__name__)
def test_one_probability_for_each_example_is_that_of_class_one(score):
    f, y = FS[:, 0], YS > 2
    p = f.sigmoid()
    expected = score(torch.stack([1 - p, p], -1), y.long())
    assert score(p, y) == pytest.approx(expected, rel=1e-12)
    assert score(f, y, logits=True) == pytest.approx(expected, rel=1e-12)


def test_one_logit_for_each_example_keeps_its_tail():
    assert metrics.nll(torch.tensor([800.0]), [0], logits=True) == 800.0


@pytest.mark.parametrize("score", SCORES, ids=lambda f: f.__name__)
def test_all_labels_of_one_class_are_fine(score):
    assert math.isfinite(score(PS, torch.zeros(len(PS), dtype=torch.long)))


NAN = math.nan


@pytest.mark.parametrize(
    ("probabilities", "targets", "options", "message"),
    [
        (np.zeros((0, 3)), [], {}, "at least one example"),
        (np.zeros(0), [], {}, "at least one example"),
        ([[[0.5, 0.5]]], [0], {}, r"shape \(N, K\) or \(N,\), got \(1, 1, 2\)"),
        (0.5, 0, {}, r"shape \(N, K\) or \(N,\), got \(\)"),
        ([[1.0], [1.0]], [0, 0], {}, "one column.*squeeze"),
        ([[0.5, 0.5]], [0, 1], {}, "as many targets as probabilities, got 2 and 1"),
        ([[0.5, 0.5]], [[0.0, 1.0]], {}, r"shape \(N,\).*argmax"),
        ([[0.5, 0.5]], [2], {}, "between 0 and 1, got 2"),
        ([[0.5, 0.5]], [-100], {}, "between 0 and 1, got -100"),
        ([[NAN, 0.5]], [0], {}, "probabilities must be finite"),
        ([[0.5, 0.6]], [0], {}, "sum of each row.* one, got 1.1; if .*logits=True"),
        ([[1.5, -0.5]], [0], {}, "not negative, got -0.5.*logits=True"),
        ([1.5, 0.5], [0, 0], {}, "at most one, got 1.5.*logits=True"),
        ([[2.0, -1.0]], [0], {}, "logits=True"),
        ([[NAN, 0.5]], [0], {"logits": True}, "NaN"),
        ([[math.inf, 0.5]], [0], {"logits": True}, "NaN"),
        ([[-math.inf, -math.inf]], [0], {"logits": True}, "NaN"),
    ],
)
def test_what_is_wrong_is_said_at_the_door(probabilities, targets, options, message):
    for score in SCORES:
        with pytest.raises(ValueError, match=message):
            score(probabilities, targets, **options)


def test_labels_that_are_no_integers_are_refused():
    with pytest.raises(TypeError, match=r"targets must be integers.*float64.*long"):
        metrics.accuracy([[0.5, 0.5]], [0.0])
    with pytest.raises(TypeError, match="targets must be integers; number the classes"):
        metrics.accuracy([[0.5, 0.5]], ["cat"])
    with pytest.raises(TypeError, match="probabilities must be"):
        metrics.accuracy("cat", [0])


def test_options_out_of_range_are_refused():
    for top_k in (0, 4):
        with pytest.raises(ValueError, match=f"top_k must be between 1 and 3, got {top_k}"):
            metrics.accuracy(EXAMPLE, LABELS, top_k=top_k)
    with pytest.raises(ValueError, match="num_bins must be at least 1, got 0"):
        metrics.ece(EXAMPLE, LABELS, num_bins=0)
    for recall in (0.0, 1.1, NAN):
        with pytest.raises(ValueError, match="recall"):
            metrics.false_positive_rate([1.0], [0.0], recall=recall)


@pytest.mark.parametrize("score", [metrics.auroc, metrics.false_positive_rate])
def test_scores_out_of_place_are_refused(score):
    with pytest.raises(ValueError, match="outside must be at least one number"):
        score([1.0], [])
    with pytest.raises(
        ValueError, match=r"inside must have shape \(N,\), got \(4, 3\).*confidence"
    ):
        score(EXAMPLE, [0.3])
    with pytest.raises(ValueError, match="inside must be numbers, got nan"):
        score([NAN], [0.3])
    assert score([math.inf, 0.0], [-math.inf, -1.0]) in (0.0, 1.0)


# ---- laws ---------------------------------------------------------------------------------------


@st.composite
def predictions(draw):
    N, K = draw(st.integers(1, 12)), draw(st.integers(2, 5))
    counts = st.lists(st.integers(0, 6), min_size=K, max_size=K).filter(any)
    p = np.array([draw(counts) for _ in range(N)], dtype=float)
    y = draw(st.lists(st.integers(0, K - 1), min_size=N, max_size=N))
    return torch.tensor(p / p.sum(1, keepdims=True)), torch.tensor(y)


@given(predictions(), st.integers(1, 9), st.booleans())
def test_scores_stay_in_their_ranges(example, num_bins, adaptive):
    p, y = example
    options = {"num_bins": num_bins, "adaptive": adaptive}
    assert 0 <= metrics.brier(p, y) <= 2 + 1e-12
    assert metrics.nll(p, y) >= 0
    # The error in every bin is at most the largest, and bins cannot hide the overall gap.
    overall = abs(metrics.accuracy(p, y) - metrics.confidence(p).mean().item())
    ece = metrics.ece(p, y, **options)
    assert overall - 1e-12 <= ece <= metrics.mce(p, y, **options) + 1e-12 <= 1 + 2e-12
    assert metrics.ece(p, y, num_bins=1) == pytest.approx(overall, abs=1e-12)


@given(predictions(), st.integers(1, 5))
def test_finer_bins_never_hide_more(example, num_bins):
    fine = metrics.ece(*example, num_bins=2 * num_bins)
    assert metrics.ece(*example, num_bins=num_bins) <= fine + 1e-12


@given(predictions(), st.randoms(use_true_random=False), st.booleans())
def test_neither_order_nor_repetition_of_examples_matters(example, random, adaptive):
    p, y = example
    order = list(range(len(y)))
    random.shuffle(order)
    for score in SCORES[:3]:
        assert score(p[order], y[order]) == pytest.approx(score(p, y), rel=1e-12)
    for score in SCORES[3:]:
        shuffled = score(p[order], y[order], adaptive=adaptive)
        assert shuffled == pytest.approx(score(p, y, adaptive=adaptive), abs=1e-12)
    for score in SCORES:
        twice = score(torch.cat([p, p]), torch.cat([y, y]))
        assert twice == pytest.approx(score(p, y), abs=1e-12)


@given(predictions(), st.randoms(use_true_random=False))
def test_names_of_the_classes_do_not_matter_to_proper_scores(example, random):
    p, y = example
    names = list(range(p.shape[1]))
    random.shuffle(names)
    renamed = torch.empty_like(p)
    renamed[:, names] = p
    for score in (metrics.nll, metrics.brier):
        assert score(renamed, torch.tensor(names)[y]) == pytest.approx(score(p, y), rel=1e-12)


@given(predictions())
def test_accuracy_grows_with_k_until_everything_is_right(example):
    p, y = example
    values = [metrics.accuracy(p, y, top_k=k) for k in range(1, p.shape[1] + 1)]
    assert values == sorted(values) and values[-1] == 1.0
    assert values[0] == (p.argmax(-1) == y).double().mean().item()


@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=5),
    st.lists(st.integers(1, 9), min_size=5, max_size=5),
)
def test_proper_scores_are_least_at_the_truth_by_a_divergence(counts, weights):
    # counts[k] examples of class k share one prediction q; f are their frequencies.
    K = len(counts)
    y = torch.arange(K).repeat_interleave(torch.tensor(counts))
    f = torch.tensor(counts).double() / sum(counts)
    q = torch.tensor(weights[:K]).double() / sum(weights[:K])
    every = (len(y), K)
    excess = metrics.brier(q.expand(every), y) - metrics.brier(f.expand(every), y)
    assert excess == pytest.approx(((q - f) ** 2).sum().item(), abs=1e-12)
    excess = metrics.nll(q.expand(every), y) - metrics.nll(f.expand(every), y)
    assert excess == pytest.approx((f * (f / q).log()).sum().item(), abs=1e-12)
    assert metrics.ece(f.expand(every), y) == pytest.approx(0, abs=1e-12)


SCORE_LISTS = st.lists(st.integers(-4, 4), min_size=1, max_size=9)


@settings(max_examples=60)
@given(SCORE_LISTS, SCORE_LISTS)
def test_auroc_counts_pairs_and_knows_ranks_only(inside, outside):
    pairs = [(a > b) + 0.5 * (a == b) for a in inside for b in outside]
    auroc = metrics.auroc(inside, outside)
    assert auroc == pytest.approx(np.mean(pairs), rel=1e-12)
    assert auroc == pytest.approx(1 - metrics.auroc(outside, inside), rel=1e-12, abs=1e-12)
    stretched = [[math.exp(3 * x) for x in scores] for scores in (inside, outside)]
    assert metrics.auroc(*stretched) == auroc

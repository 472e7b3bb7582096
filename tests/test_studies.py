import dataclasses

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pytest
from targets import line, pair

import models
from toolkit import Dataset, Guide, Model, Status, Storage, Verdict, study
from toolkit.comparison.decided import draws_wanted
from toolkit.studies import package_versions

QUICK = {"chains": 2, "warmup": 400, "draws": 3_000}


def broken(fn):
    raise RuntimeError("this guide cannot be built\nsecond line")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    storage = Storage(tmp_path_factory.mktemp("cache"))
    guides = ("mean_field", Guide("broken", broken), "full_rank")
    return storage, study(pair(), guides=guides, storage=storage, **QUICK)


def test_a_guide_that_fails_is_a_row_and_the_rest_stands(finished):
    _, done = finished
    by_name = {fitted.guide.name: fitted for fitted in done.fits}
    assert by_name["broken"].status is Status.FAILED
    assert by_name["broken"].message == "this guide cannot be built"
    assert list(done.comparison.guides.index) == ["mean_field", "broken", "full_rank"]
    assert set(done.comparison.table["guide"]) == {"mean_field", "full_rank"}


def test_a_correlated_target_accuses_the_mean_field_alone(finished):
    _, done = finished
    rows = done.comparison.guides
    assert rows.loc["mean_field", "verdict"] == "wrong"
    assert "too narrow" in rows.loc["mean_field", "sentence"]
    ratio = rows.loc["mean_field", ["worst_sd_ratio", "worst_sd_ratio_se"]].astype(float)
    assert abs(ratio.iloc[0] - np.sqrt(1 - 0.9**2)) < 5 * ratio.iloc[1] + 0.01
    assert rows.loc["full_rank", "wrong"] == 0


def test_the_same_call_goes_on_from_what_is_kept(finished):
    storage, done = finished
    again = study(pair(), guides=("mean_field", "full_rank"), storage=storage, **QUICK)
    assert set(again.resumed) == {"fit mean_field", "fit full_rank", "reference"}
    kept = done.comparison.table
    pd.testing.assert_frame_equal(again.comparison.table, kept.reset_index(drop=True))


@pytest.mark.slow
def test_a_family_is_fitted_anew_beside_one_that_it_contains(tmp_path):
    storage = Storage(tmp_path)
    study(line(), guides=("full_rank",), storage=storage, **QUICK)
    beside = study(line(), guides=("mean_field", "full_rank"), storage=storage, **QUICK)
    assert set(beside.resumed) == {"reference"}
    assert "fit full_rank" in study(line(), guides=("full_rank",), storage=storage, **QUICK).resumed


def test_stopping_in_the_reference_keeps_the_fits(tmp_path):
    storage = Storage(tmp_path)

    def stop(stage, *_):
        if stage == "reference":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study(line(), guides=("mean_field",), storage=storage, progress=stop, **QUICK)
    assert study(line(), guides=("mean_field",), storage=storage, **QUICK).resumed == ("fit mean_field",)


def test_the_command_names_what_was_asked_for(finished):
    _, done = finished
    assert done.command.startswith(
        "toolkit.study(model, guides=('mean_field', <your guide broken>, 'full_rank'), seed=0"
    )
    assert "chains=2" in done.command
    assert "tolerance" not in done.command


def test_groups_counted_from_one_are_the_first_thing_to_mend():
    def groups(group, y=None):
        with numpyro.plate("group_", 4):
            effect = numpyro.sample("effect", dist.Normal(0, 1))
        with numpyro.plate("row", 12):
            numpyro.sample("y", dist.Normal(effect[group], 1), obs=y)

    arrays = {"group": 1 + np.arange(12) % 4, "y": np.arange(12.0)}
    # So few draws fail the checks: whatever fails, NUTS is not what is to be mended.
    done = study(Model(groups, Dataset("one", arrays)), guides=("mean_field",), chains=2, warmup=50, draws=50)
    assert not done.reference.status.ok
    assert "index 4 is out of bounds for axis 0 with size 4" in done.comparison.advice[0]
    assert "counted from 0" in done.comparison.advice[0]


@pytest.mark.parametrize("wrong", [{"max_gradients": 1e6}, {"max_gradients": 0}, {"tolerance": float("inf")}])
def test_what_no_fit_would_take_is_refused_before_the_work(wrong):
    with pytest.raises(
        ValueError, match="Expected a positive tolerance in nats and a positive whole max_gradients; got"
    ):
        study(line(), guides=("mean_field",), **wrong)


@pytest.mark.slow
def test_another_seed_gives_other_numbers(finished):
    _, done = finished
    other = study(pair(), guides=("mean_field",), seed=1, **QUICK)
    same = done.comparison.table.query("guide == 'mean_field' and metric == 'shift'")["value"]
    assert not np.array_equal(other.comparison.table.query("metric == 'shift'")["value"], same)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"guides": ()}, "Expected at least one guide"),
        ({"guides": ("mean_field", "mean_field")}, "Expected each guide once; got mean_field more than once"),
        ({"guides": ("nothing",)}, "Expected a guide's name"),
        ({"guides": ("mean_field@other",)}, "Expected chart to be one of"),
        ({"chart": "other"}, "Expected chart to be one of"),
        ({"chains": 0}, "Expected chains to be at least 2; got 0"),
        (
            {"tolerance": 0.0},
            "Expected a positive tolerance in nats and a positive whole max_gradients; got 0.0 and 3000000",
        ),
        (
            {"max_gradients": 0},
            "Expected a positive tolerance in nats and a positive whole max_gradients; got 0.1 and 0",
        ),
        ({"draws": 0}, "Expected draws to be at least 8; got 0"),
        ({"focus": ("nosuch > 0",)}, "nosuch"),
        ({"seed": 2**40}, "Expected a seed from 0 to 4,294,967,295; got 1099511627776"),
        ({"seed": -1}, "Expected a seed from 0 to"),
    ],
)
def test_misuse_is_told_before_any_work(arguments, text):
    def no_work(*_):
        pytest.fail("work had begun")

    with pytest.raises(ValueError, match=text):
        study(line(), progress=no_work, **arguments)


def test_versions_name_what_the_numbers_depend_on():
    assert package_versions()["jax"] == jax.__version__


@pytest.mark.slow
def test_a_reference_is_drawn_longer_until_all_is_decided():
    known = models.load("gaussian_target").model(dimensions=3, correlation=0.5)
    settings = {"guides": ["full_rank", "mean_field"], "draws": 100}
    once = study(known, **settings)
    assert once.comparison.guides.loc["full_rank", "verdict"] == "cannot tell"
    assert once.notes == ()
    longer = study(known, **settings, until_decided=20_000)
    assert longer.comparison.guides["verdict"].tolist() == ["right", "wrong"]
    assert longer.notes[0].startswith("Drawn again with ")
    assert longer.reference.draws["z"].shape[1] > 400
    assert "until_decided=20000" in longer.command


def test_the_limit_is_kept_and_what_stays_undecided_is_told():
    known = models.load("gaussian_target").model(dimensions=3, correlation=0.5)
    settings = {"guides": ["full_rank"], "draws": 50}
    stopped = study(known, **settings, until_decided=120)
    assert stopped.reference.draws["z"].shape[1] <= 120
    (why,) = (note for note in stopped.notes if note.startswith("Drawn until decided: "))
    assert "full_rank" in why
    assert stopped.notes[-1].startswith("Each of the 2 looks")


_UNKNOWN = {"g": Verdict.CANNOT_TELL}


def _undecided(columns, *rows):
    return pd.DataFrame(rows, columns=columns)


@pytest.mark.parametrize(
    ("focus", "table", "wanted", "text"),
    [
        ([], [3.0], 3_901, ""),  # 1.3 times three, rounded up
        ([2.5], [1e6, float("inf")], 3_250, ""),  # what was not asked for does not count
        ([float("inf")], [2.0], None, "so near a threshold"),
        ([], [float("nan")], None, "or is no finite number"),
        ([], [1.1], 2_000, ""),
    ],
)
def test_only_what_was_asked_for_is_drawn_for(focus, table, wanted, text):
    asked = _undecided(["source", "verdict", "more_draws"], *[("g", "cannot tell", times) for times in focus])
    rows = _undecided(["guide", "verdict", "more_draws"], *[("g", "cannot tell", times) for times in table])
    found = draws_wanted(_UNKNOWN, rows, asked, 1_000, 50_000)
    assert found[0] == wanted
    assert text in found[1]


def test_chains_in_different_modes_are_not_drawn_longer():
    blind = dataclasses.replace(
        models.load("gaussian_target").model(target="two_modes", dimensions=2, separation=20.0), exact=None
    )
    done = study(blind, guides=["mean_field"], chains=6, warmup=200, draws=300, until_decided=20_000)
    assert done.reference.modes
    assert done.reference.draws["z"].shape[1] == 300
    assert "longer chains do not mend chains that are stuck or sit in different modes" in done.notes[-1]


@pytest.mark.parametrize(("options", "got"), [({"draws": 100, "until_decided": 50}, "50 with 100 draws")])
def test_a_limit_below_the_draws_is_misuse(options, got):
    known = models.load("gaussian_target").model(dimensions=2)
    with pytest.raises(ValueError, match=f"Expected until_decided with NUTS or exact draws.*got {got}"):
        study(known, **options)


@pytest.mark.slow
def test_a_reference_without_enough_draws_is_drawn_longer_too():
    blind = dataclasses.replace(models.load("conjugate_regression").model(), exact=None, log_evidence=None)
    done = study(blind, guides=["mean_field"], chains=2, warmup=200, draws=50, until_decided=4_000)
    assert done.reference.status is Status.PASSED
    assert done.comparison.guides.loc["mean_field", "verdict"] == "wrong"

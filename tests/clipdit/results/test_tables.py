"""The tables of a comparison: what stands in them is what a reader can work out from the values."""

import statistics

import pytest

from clipdit.results.tables import COLUMNS, against_ours, markdown


def row(name: str, role: str, **values: list[float]) -> dict:
    training = [{"seed": 0, "steps": 10, "images": 40, "minutes": 1.0}]
    plain = {"name": name, "label": name, "role": role, "about": "it", "of": 8, "training": training, "cost": None}
    return plain | {"values": {heading: values.get(heading.replace(" ", "_"), []) for heading in COLUMNS}}


OURS = row("ours", "ours", KID=[0.10, 0.11, 0.12], PSNR=[13.0, 13.5, 14.0])


def test_the_interval_against_ours_is_welchs():
    theirs = row("pix2pix", "baseline", KID=[0.20, 0.24, 0.22], PSNR=[13.4, 13.6, 13.5])
    found = against_ours([theirs, OURS])["pix2pix"]
    # by hand: variances 0.0004 and 0.0001 of 3 each; 2.94 degrees of freedom, of which t is 3.219 at 97.5 %
    error = (0.0004 / 3 + 0.0001 / 3) ** 0.5
    freedom = (0.0005 / 3) ** 2 / (((0.0004 / 3) ** 2 + (0.0001 / 3) ** 2) / 2)
    assert freedom == pytest.approx(2.941, abs=0.001)
    assert found["KID"]["difference"] == pytest.approx(0.11)
    assert found["KID"]["high"] == pytest.approx(0.11 + 3.2191 * error, abs=2e-5)
    assert found["KID"]["low"] == pytest.approx(0.11 - 3.2191 * error, abs=2e-5)
    assert found["PSNR"]["low"] < 0 < found["PSNR"]["high"]


def test_a_row_of_one_seed_is_taken_to_vary_as_ours_does():
    found = against_ours([OURS, row("concat", "ablation", KID=[0.2])])["concat"]["KID"]
    # t of 2 degrees of freedom at 97.5 % is 4.3027
    wide = 4.3027 * statistics.stdev([0.10, 0.11, 0.12]) * (1 + 1 / 3) ** 0.5
    assert (found["low"], found["high"]) == (pytest.approx(0.09 - wide, abs=1e-5), pytest.approx(0.09 + wide, abs=1e-5))


def test_without_seeds_of_ours_there_is_no_interval():
    theirs = row("pix2pix", "baseline", KID=[0.20, 0.24, 0.22])
    assert against_ours([theirs]) == {} == against_ours([theirs, row("ours", "ours", KID=[0.1])])
    floor = row("real", "floor", KID=[0.0])
    assert against_ours([OURS, row("ours-1-steps", "ours", KID=[0.2, 0.2, 0.3]), floor]) == {}, "nothing to tell apart"


def test_where_no_seed_differs_there_is_no_interval():
    ours = row("ours", "ours", failed=[0, 0, 0], KID=[0.1, 0.2, 0.3])
    theirs = row("pix2pix", "baseline", failed=[3, 3, 3], KID=[0.2, 0.2, 0.2])
    assert list(against_ours([theirs, ours])["pix2pix"]) == ["KID"]


def test_intervals_are_printed_and_what_leaves_out_zero_is_bold():
    rows = [row("pix2pix", "baseline", KID=[0.20, 0.24, 0.22], PSNR=[13.4, 13.6, 13.5]), OURS]
    hardware = {"cpu": "a CPU", "cores": 2, "gpus": []}
    plan = {"seeds": [0, 1, 2], "ablation_seeds": 1, "data": "pairs", "minutes": 8, "best_of": 8}
    plain = {"plan": plan, "rows": rows, "protocol": {}}
    text = markdown(plain | {"hardware": hardware, "failed": {}, "against_ours": against_ours(rows)})
    assert "| **+0.110 (+0.068 to +0.152)** | +0.0 (-1.2 to +1.2) |" in text
    assert "| 0.220 ± 0.020 | **13.5 ± 0.1** |" in text
    assert "95 % interval" not in markdown(plain | {"hardware": hardware, "failed": {}, "against_ours": {}})
    assert "ablations" not in text
    one = [*rows, row("concat", "ablation", KID=[0.2])]
    assert "over seeds; ablations of the first alone." in markdown(
        plain | {"rows": one, "hardware": hardware, "failed": {}, "against_ours": against_ours(one)}
    )


def test_seeds_become_an_interval_and_the_best_is_bold():
    def row(name: str, kid: list[float], psnr: list[float], role: str = "ours") -> dict:
        values = {heading: [] for heading in COLUMNS} | {"KID": kid, "PSNR": psnr}
        made = {"name": name, "label": name, "role": role, "values": values, "of": 8}
        if role == "floor":
            return made
        runs = [{"steps": steps, "images": 2 * steps, "minutes": 0.96} for steps in (1000, 1010)]
        time = {"median": 12.3, "low": 11.8, "high": 20.0}
        cost = {"parameters": 7_500_000, "gflop_per_image": 38.44, "ms_per_image": time} if name == "a" else None
        return made | {"about": "", "training": runs, "cost": cost}

    rows = [row("a", [0.1, 0.3], [14.0, 14.0]), row("b", [0.4, 0.4], [15.0, 17.0]), row("real", [0.0], [], role="floor")]
    plan = {"seeds": [0, 1], "ablation_seeds": 1, "data": "x", "minutes": 1, "best_of": 2}
    machine = {"gpus": [], "cpu": "c", "cores": 2}
    text = markdown({"plan": plan, "rows": rows, "hardware": machine, "protocol": {}, "failed": {}, "against_ours": {}})
    assert "| a | **0.200 ± 0.141** | 14.0 ± 0.0 |" in text
    assert "| b | 0.400 ± 0.000 | **16.0 ± 1.4** |" in text
    assert "| a | 1,000 / 1,010 | 2,000 / 2,020 | 1.0 / 1.0 | 7.5 M | 38.4 | 12 (12 to 20) |" in text
    assert "| b | 1,000 / 1,010 | 2,000 / 2,020 | 1.0 / 1.0 |  |  |  |" in text
    assert text.count("| real |") == 1 and "| real | 0.000 |" in text and "standard deviation over seeds" in text

"""Chapter 04: inversion against least squares, rows that stay alone, a kept generator."""

import csv
import importlib
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close

import common
from harness import (all_white, folder_of_pictures, killed_after, one_line, rejected, results,
                     same)
from strategies import generator, normal, seeds

inversion = importlib.import_module("04_inversion")
EPS = torch.finfo(torch.float64).eps
counts, starts = st.integers(1, 5), st.integers(1, 4)


def small_generator(seed, d=3):
    """A smooth net z [B, d] -> [B, 1, 4, 4] with batch norm, which sees many minima."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(d, 20), nn.BatchNorm1d(20), nn.Tanh(), nn.Linear(20, 16),
                         nn.Unflatten(1, (1, 4, 4)), nn.Tanh()).double().eval()


# --- inversion ---------------------------------------------------------------------------------

def best_start_of_each_picture(invert, seed, n, r):
    """The returned z has the smallest error over the starts, for each picture by itself."""
    G, x, z0 = small_generator(seed), normal(seed, n, 1, 4, 4).tanh(), normal(seed + 1, n, r, 3)
    z, errors = invert(G, x, z0, 7, 0.3)
    assert z.shape == (n, 3) and errors.shape == (n, r, 8)
    for i in range(n):
        alone = [((G(z[i:i + 1]) - x[i]) ** 2).mean().item()]
        for j in range(r):
            alone.append(((G(z0[i, j:j + 1]) - x[i]) ** 2).mean().item())
            assert errors[i, j, 0].item() == pytest.approx(alone[-1], rel=1e-9)
        assert alone[0] == pytest.approx(errors[i, :, -1].min().item(), rel=1e-9)


@given(seeds(), counts, starts)
def test_the_best_start_is_kept_for_each_picture(seed, n, r):
    best_start_of_each_picture(inversion.invert, seed, n, r)


def test_one_best_start_for_the_whole_batch_is_found_out():
    def twin(G, x, z0, steps, lr):
        n, r, d = z0.shape
        errors = inversion.invert(G, x, z0, steps, lr)[1]
        one = errors[:, :, -1].mean(dim=0).argmin()
        return inversion.invert(G, x, z0[:, one:one + 1], steps, lr)[0], errors
    assert any(rejected(best_start_of_each_picture, twin, seed, 5, 4) for seed in range(3))


def a_batch_is_many_single_runs(invert, seed, n, r):
    """Each row of z moves as if it were alone: the sum of the errors couples nothing."""
    G, x, z0 = small_generator(seed), normal(seed, n, 1, 4, 4).tanh(), normal(seed + 1, n, r, 3)
    z, errors = invert(G, x, z0, 7, 0.3)
    for i in range(n):
        for j in range(r):
            _, alone = invert(G, x[i:i + 1], z0[i:i + 1, j:j + 1], 7, 0.3)
            assert_close(alone[0, 0], errors[i, j], rtol=1e-7, atol=1e-9)


@given(seeds(), st.integers(2, 5), starts)
def test_a_batch_is_many_single_runs(seed, n, r):
    a_batch_is_many_single_runs(inversion.invert, seed, n, r)


def test_one_rate_for_all_rows_is_found_out():
    """A twin whose gradient is normalised over the batch, so that rows share one step size."""
    def twin(G, x, z0, steps, lr):
        n, r, d = z0.shape
        z = z0.reshape(n * r, d).clone().requires_grad_()
        errors = []
        for _ in range(steps + 1):
            error = ((G(z) - x.repeat_interleave(r, 0)) ** 2).flatten(1).mean(1)
            grad, = torch.autograd.grad(error.sum(), z)
            z = (z - lr * grad / grad.norm()).detach().requires_grad_()
            errors.append(error.detach())
        return z.view(n, r, d)[:, 0].detach(), torch.stack(errors, 1).view(n, r, -1)
    assert rejected(a_batch_is_many_single_runs, twin, 0, 4, 2)


def a_start_that_ends_at_nan_loses(invert, seed, n, r):
    """One start more, which is nan for every picture: the others' best is found as without it."""
    G, x, z0 = small_generator(seed), normal(seed, n, 1, 4, 4).tanh(), normal(seed + 1, n, r, 3)
    z, errors = inversion.invert(G, x, z0, 4, 0.3)
    for at in range(r + 1):
        bad = torch.full((n, 1, 3), math.nan, dtype=torch.float64)
        more, errors_of_more = invert(G, x, torch.cat([z0[:, :at], bad, z0[:, at:]], 1), 4, 0.3)
        assert_close(more, z, rtol=1e-9, atol=1e-12)
        assert errors_of_more[:, at].isnan().all()
        others = torch.cat([errors_of_more[:, :at], errors_of_more[:, at + 1:]], dim=1)
        assert_close(others, errors, rtol=1e-9, atol=1e-12)


@given(seeds(), counts, starts)
def test_a_start_that_ends_at_nan_loses_to_all_others(seed, n, r):
    a_start_that_ends_at_nan_loses(inversion.invert, seed, n, r)


def test_a_nan_loses_to_an_infinite_error_too():
    G = nn.Sequential(nn.Linear(3, 16), nn.Unflatten(1, (1, 4, 4))).double().eval()
    G[0].weight.data *= 1e200  # squares of its pictures are no float64
    x, z0 = normal(1, 2, 1, 4, 4), normal(2, 2, 2, 3)
    z0[:, 0] = math.nan
    z, errors = inversion.invert(G, x, z0, 0, 0.1)
    assert errors[:, 1].isinf().all() and torch.equal(z, z0[:, 1])


def test_pictures_of_a_shape_that_g_does_not_draw_are_refused():
    """They would broadcast: each picture with all, one for all, grey for colour."""
    G, x, z0 = small_generator(0), normal(1, 4, 1, 4, 4), normal(2, 4, 2, 3)
    for other in (x[:, 0], x[:1], x[:, :, :1], x.expand(4, 3, 4, 4)):
        with pytest.raises(ValueError, match=r"\(8, 1, 4, 4\) and"):
            inversion.invert(G, other, z0, 1, 0.1)


def test_a_plain_argmin_is_found_out():
    def twin(G, x, z0, steps, lr):
        errors = inversion.invert(G, x, z0, steps, lr)[1]
        best = z0[torch.arange(len(x)), errors[:, :, -1].argmin(dim=1)]
        return inversion.invert(G, x, best[:, None], steps, lr)[0], errors
    assert rejected(a_start_that_ends_at_nan_loses, twin, 0, 2, 2)


@given(seeds(), st.integers(2, 4), st.integers(2, 3))
def test_it_does_not_matter_how_tensors_lie_in_memory(seed, n, r):
    """Transposed, or channels last: the same to the last bit."""
    torch.manual_seed(seed)
    G = nn.Sequential(nn.Linear(3, 48), nn.Unflatten(1, (3, 4, 4))).double().eval()
    x, z0 = normal(seed, n, 3, 4, 4), normal(seed + 1, r, n, 3).transpose(0, 1)
    expected = inversion.invert(G, x, z0.contiguous(), 3, 0.3)
    G.to(memory_format=torch.channels_last)
    for other in (x.to(memory_format=torch.channels_last),
                  x.transpose(2, 3).contiguous().transpose(2, 3)):
        found = inversion.invert(G, other, z0, 3, 0.3)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@settings(max_examples=8)
@given(seeds(), st.integers(1, 3))
def test_a_linear_generator_is_inverted_by_least_squares(seed, n):
    """The objective is convex: every start ends at the one minimum that torch's solver gives.

    5 pixels more than coordinates; Q with orthonormal columns, so that Adam's path is short.
    """
    Q, _ = torch.linalg.qr(normal(seed, 9, 4))
    G = nn.Sequential(nn.Linear(4, 9, bias=False), nn.Unflatten(1, (1, 3, 3))).double().eval()
    G[0].weight.data = Q
    x = normal(seed + 1, n, 1, 3, 3)
    z, errors = inversion.invert(G, x, normal(seed + 2, n, 2, 4), 400, 0.1)
    expected = torch.linalg.lstsq(Q, x.flatten(1).T).solution.T
    assert_close(z, expected, rtol=0, atol=0.01)  # what Adam's last small steps leave
    residual = ((expected @ Q.T - x.flatten(1)) ** 2).mean(dim=1)
    assert_close(errors[:, :, -1], residual[:, None].expand(-1, 2), rtol=0, atol=1e-4)


@given(seeds())
def test_neither_the_generator_nor_the_starts_are_changed(seed):
    G, x, z0 = small_generator(seed), normal(seed, 2, 1, 4, 4), normal(seed + 1, 2, 2, 3)
    before, starts_before = {k: v.clone() for k, v in G.state_dict().items()}, z0.clone()
    z, _ = inversion.invert(G, x, z0, 3, 0.1)
    assert all(torch.equal(v, before[k]) for k, v in G.state_dict().items())
    assert all(p.grad is None for p in G.parameters())
    assert torch.equal(z0, starts_before) and not z.requires_grad


def test_no_steps_leave_the_start_as_it_is():
    G, x, z0 = small_generator(0), normal(1, 2, 1, 4, 4), normal(2, 2, 1, 3)
    z, errors = inversion.invert(G, x, z0, 0, 0.1)
    assert torch.equal(z, z0[:, 0]) and errors.shape == (2, 1, 1)


def test_a_generator_in_training_mode_is_refused():
    with pytest.raises(ValueError, match="eval"):
        inversion.invert(small_generator(0).train(), torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 3),
                         1, 0.1)


# --- encoder, measures -------------------------------------------------------------------------

def both_terms_count(loss, seed):
    """With E the transpose of an orthonormal Q: z is found again, and off Q's plane pixels stay."""
    Q, _ = torch.linalg.qr(normal(seed, 9, 4))
    x, z = normal(seed + 1, 6, 9), normal(seed + 2, 6, 4)
    off = x - x @ Q @ Q.T
    assert_close(loss(lambda a: a @ Q, lambda z: z @ Q.T, x, z), (off ** 2).mean(), rtol=1e-9,
                 atol=100 * EPS)
    shift = 0.5  # an E that is off by a constant pays for it in z, and in the pixels
    paid = loss(lambda a: a @ Q + shift, lambda z: z @ Q.T, x @ Q @ Q.T, z)
    assert_close(paid, torch.tensor(shift ** 2 * (1 + 4 / 9), dtype=torch.float64), rtol=1e-9,
                 atol=100 * EPS)


@given(seeds())
def test_the_encoder_pays_for_codes_and_for_pixels(seed):
    both_terms_count(inversion.encoder_loss, seed)


@pytest.mark.parametrize("twin", [
    lambda E, G, x, z: ((E(G(z)) - z) ** 2).mean(),
    lambda E, G, x, z: ((G(E(x)) - x) ** 2).mean(),
    lambda E, G, x, z: ((E(G(z)) - z) ** 2).sum() + ((G(E(x)) - x) ** 2).mean()],
    ids=["codes alone", "pixels alone", "sum for mean"])
def test_wrong_encoder_losses_are_found_out(twin):
    assert rejected(both_terms_count, twin, 0)


@given(seeds(), st.integers(1, 8))
def test_report_against_loops(seed, n):
    x, x_rec = normal(seed, n, 2, 3, 3), normal(seed + 1, n, 2, 3, 3)
    x_rec[0] = x[0] + 0.9 * inversion.FOUND ** 0.5
    y = torch.randint(3, (n,), generator=generator(seed))
    error = [sum((a - b) ** 2 for a, b in zip(p.flatten().tolist(), q.flatten().tolist())) / 18
             for p, q in zip(x, x_rec)]
    z, z_true = normal(seed + 2, n, 4), normal(seed + 3, n, 4)
    found = inversion.report(x, x_rec, z, z_true, y)
    assert found["mse"] == pytest.approx(sum(error) / n)
    assert found["psnr"] == pytest.approx(10 * math.log10(4 / (sum(error) / n)))  # peak: 2
    assert found["found"] == pytest.approx(1 / n)
    for k in set(y.tolist()):
        mine = [e for e, label in zip(error, y.tolist()) if label == k]
        assert found[f"class {k}"] == pytest.approx(sum(mine) / len(mine))
    rows = list(zip(z.tolist(), z_true.tolist()))
    assert found["norm"] == pytest.approx(sum(math.hypot(*a) for a, _ in rows) / n)
    assert found["z error"] == pytest.approx(sum(math.dist(a, b) ** 2 for a, b in rows) / (4 * n))
    assert math.isnan(inversion.report(x, x_rec, z, None, None)["z error"])


@given(seeds(), st.integers(0, 6), st.integers(0, 5))
def test_the_worst_window_is_where_the_error_was_planted(seed, row, column):
    x = normal(seed, 1, 3, 10, 9)
    x_rec = x + 0.1
    x_rec[:, :, row:row + 4, column:column + 4] += 1
    value, top, left = inversion.worst_window(x, x_rec, 4)
    assert (top.item(), left.item()) == (row, column)
    assert value.item() == pytest.approx(1.1 ** 2)


def test_a_frame_marks_the_window_and_nothing_else():
    x = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    picture = inversion.framed(x, torch.tensor([2]), torch.tensor([3]), 4)[0]
    red = (picture[0] == 255).nonzero().tolist()
    expected = [[i, j] for i in range(2, 6) for j in range(3, 7) if i in (2, 5) or j in (3, 6)]
    assert red == expected and picture[0].count_nonzero() == 12 and x.count_nonzero() == 0


@pytest.mark.parametrize("c, side", [(1, 28), (3, 32), (3, 64)])
def test_nets_have_their_shapes(c, side):
    G, D, E = (net.eval() for net in (inversion.generator(5, c, side),
                                      inversion.discriminator(c, side),
                                      inversion.encoder(5, c, side)))
    x = G(torch.randn(4, 5))
    assert x.shape == (4, c, side, side) and x.abs().max() <= 1
    assert D(x).shape == (4,) and E(x).shape == (4, 5)


# --- whole runs --------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def small_runs(monkeypatch, no_figures):
    for name, value in (("N_SAMPLES", 100), ("N_SELF", 3), ("N_TEST", 5), ("CHUNK", 4)):
        monkeypatch.setattr(inversion, name, value)


def run(out, digits_dir, *flags):
    inversion.main(["--data", "digits", "--data-dir", str(digits_dir), "--steps", "5", "--batch",
                    "8", "--encoder-steps", "4", "--starts", "2", "--invert-steps", "3",
                    "--out", str(out), *flags])
    return results(out)


@pytest.fixture
def found(monkeypatch):
    """A list that grows by what each run has found: every z and its errors, by pictures, method."""
    runs, figures = [], inversion.figures

    def keep(args, name, G, x, y, results, samples):
        runs.append({(label, method, key): numbers[key] for label, methods in results.items()
                     for method, numbers in methods.items() for key in ("z", "errors")})
        figures(args, name, G, x, y, results, samples)

    monkeypatch.setattr(inversion, "figures", keep)
    return runs


def test_a_run_killed_in_either_half_resumes_to_the_same_bits(tmp_path, digits_dir, found):
    straight = run(tmp_path / "straight", digits_dir)
    assert sorted(straight) == ["log.csv", "samples.pt"] and len(straight["samples.pt"]) == 100
    for death, place in ((2, ("generator", 2)), (3, ("generator", 5)), (2, ("encoder", 2))):
        with killed_after(death):  # in the first half, at its end, in the second half
            run(tmp_path / "killed", digits_dir, "--resume")
        saved = torch.load(tmp_path / "killed" / "checkpoint.pt")
        assert (saved["name"], saved["step"]) == place
    assert same(run(tmp_path / "killed", digits_dir, "--resume"), straight)
    assert len(found) == 2 and same(*found)
    kept = [torch.load(tmp_path / name / "generator.pt") for name in ("straight", "killed")]
    assert same(kept[0]["G"], kept[1]["G"]) and same(kept[0]["E"], kept[1]["E"])
    rows = csv.DictReader((tmp_path / "killed" / "log.csv").open())
    assert [(row["model"], row["step"]) for row in rows] == [
        *(("generator", step) for step in "12345"), *(("encoder", step) for step in "1234")]


@pytest.mark.usefixtures("no_checkpoints")
def test_no_random_start_is_the_answer(tmp_path, digits_dir, monkeypatch):
    """The z of G's own pictures and the starts are other numbers, though both are of one seed."""
    answers, starts, report, invert = [], [], inversion.report, inversion.invert

    def keep_answer(x, x_rec, z, z_true, y):
        answers.extend([] if z_true is None else [z_true])
        return report(x, x_rec, z, z_true, y)

    def keep_starts(G, x, z0, steps, lr):
        starts.append(z0.flatten(0, 1))
        return invert(G, x, z0, steps, lr)

    monkeypatch.setattr(inversion, "report", keep_answer)
    monkeypatch.setattr(inversion, "invert", keep_starts)
    run(tmp_path, digits_dir)
    assert answers[0].shape == (3, 128) and len(starts) > 2
    assert torch.cdist(torch.cat(starts), answers[0]).min() > 1  # unrelated draws: √(2 · 128) = 16


@pytest.mark.usefixtures("no_checkpoints")
def test_g_learns_what_the_data_look_like(tmp_path, digits_dir, monkeypatch):
    """All data white: with the right signs G's pictures, grey at the start, become lighter."""
    all_white(monkeypatch)
    run(tmp_path, digits_dir, "--steps", "40")
    assert torch.load(tmp_path / "samples.pt").float().mean() > 160


def test_the_kept_generator_is_used_and_gives_the_same_numbers(tmp_path, digits_dir, found,
                                                               monkeypatch):
    fresh = run(tmp_path, digits_dir)
    for name in ("train_generator", "train_encoder"):
        monkeypatch.setattr(inversion, name, lambda *args: pytest.fail("trained again"))
    assert same(run(tmp_path, digits_dir), fresh) and same(*found)
    run(tmp_path, digits_dir, "--starts", "1")  # says nothing about the generator


@pytest.mark.parametrize("flags, words", [
    (["--z-dim", "9"], ["z_dim 128", "has 9"]), (["--steps", "6"], ["steps 5", "has 6"]),
    (["--seed", "1"], ["seed 0", "has 1"]), (["--encoder-steps", "1"], ["encoder_steps 4"])])
def test_a_generator_of_other_flags_is_refused(tmp_path, digits_dir, capsys, flags, words):
    run(tmp_path, digits_dir)
    before = (tmp_path / "generator.pt").read_bytes()
    capsys.readouterr()
    one_line(capsys, lambda: run(tmp_path, digits_dir, *flags), *words)
    assert (tmp_path / "generator.pt").read_bytes() == before


def test_a_generator_of_other_shapes_is_refused(tmp_path, digits_dir, capsys):
    run(tmp_path, digits_dir)
    capsys.readouterr()
    folder = folder_of_pictures(tmp_path / "p", 20, 32)
    one_line(capsys, lambda: run(tmp_path, digits_dir, "--data", folder, "--size", "32"),
             "shape [1, 28, 28]", "has [3, 32, 32]")


def test_a_generator_of_another_folder_of_the_same_name_is_refused(tmp_path, digits_dir, capsys):
    folders = []
    for n in (20, 21):  # so many pictures, from black to red
        (tmp_path / str(n)).mkdir()
        folders.append(["--data", folder_of_pictures(tmp_path / str(n) / "p", n, 32), "--size",
                        "32"])
    first = run(tmp_path / "out", digits_dir, *folders[0])
    capsys.readouterr()
    one_line(capsys, lambda: run(tmp_path / "out", digits_dir, *folders[1]), "generator.pt",
             "other pictures than p has now", "--out")
    assert same(run(tmp_path / "out", digits_dir, *folders[0]), first)


def test_a_broken_generator_file_is_named(tmp_path, digits_dir, capsys):
    for broken in (b"no torch file", None):
        if broken:
            (tmp_path / "generator.pt").write_bytes(broken)
        else:
            common.save({"G": 1}, tmp_path / "generator.pt")
        one_line(capsys, lambda: run(tmp_path, digits_dir), "generator.pt", "move it away")


@pytest.mark.usefixtures("no_checkpoints")
@pytest.mark.parametrize("flag, value, reached", [
    ("--starts", 3, lambda calls: {z0.shape[1] for G, x, z0, steps, lr in calls} == {3, 1}),
    # the hybrid makes as many steps as both starts together, the encoder none
    ("--invert-steps", 4, lambda calls: {steps for *_, steps, lr in calls} == {4, 0, 8}),
    ("--invert-lr", 0.01, lambda calls: {lr for *_, lr in calls} == {0.01})])
def test_options_reach_the_search(tmp_path, digits_dir, monkeypatch, flag, value, reached):
    """Compared where they arrive: printed digits of two different searches may be the same."""
    calls, invert = [], inversion.invert
    monkeypatch.setattr(inversion, "invert", lambda *a: calls.append(a) or invert(*a))
    run(tmp_path, digits_dir, flag, str(value))
    assert reached(calls)


@pytest.mark.usefixtures("no_checkpoints")
@pytest.mark.parametrize("flags", [["--batch", "9"], ["--encoder-steps", "3"], ["--z-dim", "8"]])
def test_options_reach_the_training(tmp_path, digits_dir, flags):
    """Other weights of the encoder; 1e-6 is above the rounding of its largest entries."""
    nets = []
    for more in ([], flags):
        run(tmp_path / str(len(more)), digits_dir, *more)
        E = torch.load(tmp_path / str(len(more)) / "generator.pt")["E"]
        nets.append(torch.cat([v.flatten().double() for v in E.values()]))
    assert nets[0].shape != nets[1].shape or (nets[0] - nets[1]).abs().max() > 1e-6


def test_the_generator_stays_as_it_is_while_the_encoder_learns(tmp_path, digits_dir):
    """Not even the statistics of its batch norms move: the samples are the same."""
    one, many = (run(tmp_path / n, digits_dir, "--encoder-steps", n)["samples.pt"] for n in "19")
    assert torch.equal(one, many)


@pytest.mark.draws
def test_a_small_folder_without_labels_is_enough(tmp_path, digits_dir, capsys):
    folder = folder_of_pictures(tmp_path / "p", 20, 32)
    run(tmp_path / "o", digits_dir, "--data", folder, "--size", "32")
    assert "class" not in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [
    (["--starts", "0"], ["--starts", "0"]), (["--invert-lr", "0"], ["--invert-lr"]),
    (["--batch", "1"], ["--batch 2 or more"]), (["--z-dim", "-3"], ["--z-dim", "-3"])])
def test_bad_flags_get_one_line(tmp_path, digits_dir, capsys, flags, words):
    one_line(capsys, lambda: run(tmp_path, digits_dir, *flags), *words)


def test_sides_that_the_generator_cannot_draw_are_refused(tmp_path, digits_dir, capsys):
    folder = folder_of_pictures(tmp_path / "p", 20, 30)
    one_line(capsys, lambda: run(tmp_path / "o", digits_dir, "--data", folder, "--size", "30"),
             "--size 28")


def test_a_loss_that_explodes_names_itself(tmp_path, digits_dir, monkeypatch, capsys):
    monkeypatch.setattr(inversion, "encoder_loss", lambda E, G, x, z: E(x).sum() * math.nan)
    one_line(capsys, lambda: run(tmp_path, digits_dir), "loss_e is nan at step 1", status=1)
    assert not (tmp_path / "generator.pt").exists()
    saved = torch.load(tmp_path / "checkpoint.pt")
    assert saved["name"] == "generator" and saved["step"] == 5


@settings(max_examples=5)
@given(st.integers(1, 40))
def test_figures_take_any_number_of_pictures(n):
    x = torch.arange(float(n))[:, None, None, None].expand(n, 1, 4, 4) / n
    ends = inversion.between(x).unflatten(0, (8, 9))[:, [0, -1]]
    assert_close(ends.flatten(0, 1), torch.cat([x] * 16)[:16])
    labels = torch.arange(n) % 10
    each = [min(20 // min(n, 10), (labels == k).sum()) for k in labels.unique()]
    assert len(inversion.worst(x, torch.zeros_like(x), labels)[0]) == 2 * sum(each)
    assert len(inversion.worst(x, torch.zeros_like(x), None)[0]) == 2 * min(n, 20)
    assert len(inversion.worst(x, torch.zeros_like(x), torch.arange(n))[0]) == 2 * min(n, 20)

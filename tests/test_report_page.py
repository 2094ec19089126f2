"""The page of an evaluation: self-contained, whole, and safe whatever names say."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from evaluations import TRANSFORMATIONS, Page, make_record, without, write_evaluation
from PIL import Image

from efae_jax import report
from efae_jax.errors import UserError
from efae_jax.report import plots
from efae_jax.report.gallery import MOST, SMALL
from efae_jax.report.svg import colour

HOSTILE = "<script>alert('x')</script>\"&amp; $\\frac{$"


def page_of(tmp_path, *evaluations):
    """The parsed page of (record, folder)s."""
    report.write_page(evaluations, tmp_path / "page.html")
    return Page((tmp_path / "page.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    record = make_record(0)
    write_evaluation(folder / "e", record, images=2)
    return record, page_of(folder, (record, folder / "e"))


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Two that compare; a third on fewer images, other features and inputs, and one turn more."""
    folder = tmp_path_factory.mktemp("several")
    records = [make_record(i) for i in range(3)]
    records[1]["name"] = "runs/" + "long_name/" * 12 + "end"
    records[2] |= {"images": 50, "frechet": "torch-fidelity"}
    records[2]["transformations"].append(
        {**records[2]["transformations"][0], "name": "r45", "label": "rotation 45°"}
    )
    folders = [
        write_evaluation(folder / str(i), record, inputs=i // 2) for i, record in enumerate(records)
    ]
    return records, folders, page_of(folder, *zip(records, folders, strict=True))


@pytest.fixture(params=["one", "several"])
def any_page(request):
    return request.getfixturevalue(request.param)[-1]


def pixels(uri):
    kind, data = re.fullmatch(r"data:image/(\w+);base64,(.*)", uri).groups()
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.format == kind.upper()
    return np.asarray(image.convert("RGB"))


def stored(folder, name):
    return np.asarray(Image.open(folder / "pictures" / f"{name}.png"))


def same(a, b):
    return a.shape == b.shape and (a == b).all()


def test_nothing_is_asked_of_elsewhere(any_page):
    names = {tag for tag, _ in any_page.tags}
    assert not names & {"script", "iframe", "object", "embed", "base", "form", "metadata"}
    ids = {attributes["id"] for _, attributes in any_page.tags if "id" in attributes}
    for tag, attributes in any_page.tags:
        for key, value in attributes.items():
            assert not key.startswith(("on", "xmlns")), (tag, key)
            if key in ("src", "href", "xlink:href", "srcset", "data"):
                inside = value.startswith("#") and value[1:] in ids
                assert inside or value.startswith("data:"), (tag, value[:80])
            elif value and "url(" in value:
                assert re.search(r"url\(#([^)]*)\)", value)[1] in ids, value
    style = [value for _, attributes in any_page.tags for value in attributes.values()]
    assert not any("http:" in (v or "") or "https:" in (v or "") for v in style)
    (policy,) = [a for a in any_page.of("meta") if "http-equiv" in a]
    assert policy["content"].startswith("default-src 'none'")


def test_the_style_asks_for_nothing(tmp_path):
    record = make_record()
    report.write_page([(record, tmp_path)], tmp_path / "page.html")
    style = re.search(r"<style>(.*?)</style>", (tmp_path / "page.html").read_text(), re.DOTALL)[1]
    assert "var(--sans)" in style
    assert "url(" not in style
    assert "@import" not in style


def test_ids_are_unique(any_page):
    ids = [attributes["id"] for _, attributes in any_page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert len(any_page.of("svg")) > 3  # which would collide, drawn by one library


def test_plots_are_text_that_scales(any_page):
    for svg in any_page.of("svg"):
        # HTML parsers lower attribute names; a page's keeps viewBox.
        assert svg["viewbox"].startswith("0 0 360 ")
        assert svg["aria-label"]
        assert not {"width", "height"} & set(svg)
    assert "frequency / highest" in any_page.text
    assert "mean ± std" in any_page.text


def test_the_figures_of_one_model(one):
    record, page = one
    plain = record["reconstruction"]
    tiles = [f"{plain['psnr']:.2f} dB", f"{plain['ssim']:.3f}", f"{plain['lpips']:.3f}"]
    position = [page.text.index(t) for t in [*tiles, f"{plain['frechet']:.2f}"]]
    assert position == sorted(position)
    table = page.tables[0]
    heading = [cell.replace("\xa0", " ") for cell in table[0]]
    assert heading == ["t", "error ↓", "Fréchet distance (VGG16) ↓", "PSNR (dB) ↑", "LPIPS ↓",
                       "SSIM ↑"]  # fmt: skip
    rows = {row[0]: row[1:] for row in table[1:]}
    order = ["identity", "rotation 90°", "rotation 180°", "mean of rotations", "horizontal flip",
             "scale 0.5"]  # fmt: skip
    assert list(rows) == order

    def texts(error, of):
        return [error, f"{of['frechet']:.2f}", f"{of['psnr']:.2f}", f"{of['lpips']:.3f}",
                f"{of['ssim']:.3f}"]  # fmt: skip

    assert rows["identity"] == texts("–", plain)
    for t in record["transformations"]:
        assert rows[t["label"]] == texts(f"{t['error']:.3f}", t)
    a, b = record["transformations"][:2]
    mean = {key: (a[key] + b[key]) / 2 for key in ("psnr", "ssim", "lpips", "frechet")}
    assert rows["mean of rotations"] == texts(f"{record['errors']['rotation']:.3f}", mean)
    assert "*" not in str(table)  # nothing is best of one


def test_choices_and_identity_are_all_there(one):
    record, page = one
    cells = {row[0]: row[1:] for table in page.tables[1:] for row in table}
    assert cells["name"] == ["eq-vae"]
    assert cells["latent"] == ["a sample of the posterior"]
    assert cells["Fréchet distance"] == ["mean over positions"]
    assert cells["latent space"] == ["in the model's own units"]
    assert cells["seed"] == ["7"]
    assert cells["images evaluated"] == ["1,000"]
    assert cells["sha256"] == [record["model"]["sha256"]]
    assert cells["parameters"] == ["83,653,863"]
    assert cells["size"] == ["64×64"]
    assert cells["unreadable"] == ["2"]
    assert cells["representation"] == ["–"]
    assert cells["time"] == ["252 s"]
    assert cells["jax"] == ["0.10.2"]
    names = {"PSNR": "psnr", "LPIPS": "lpips", "Fréchet distance": "frechet",
             "sha256 of the names": "keys"}  # fmt: skip
    shown = {names.get(name, name) for name in cells}
    for part in ("protocol", "model", "data", "versions"):
        assert {key.replace("_", " ") for key in record[part]} - {"efae jax"} <= shown, part


def test_the_latent_space_is_explained(one):
    record, page = one
    latent = record["latent"]
    for value, digits in (
        (latent["mean_abs_correlation"], 3),
        (latent["high_frequency"], 3),
        (latent["high_frequency_image"], 3),
        (latent["intrinsic_dimension"], 1),
        (latent["velocity_irreducible_variance"]["value"], 1),
        (latent["velocity_irreducible_variance"]["per_dimension"], 3),
        (np.mean(latent["std"]), 2),
        (np.mean(latent["excess_kurtosis"]), 2),
    ):
        assert f"{value:.{digits}f}" in page.text
    for words in ("TwoNN", "of 256 numbers, 1,000 images", "√λ", "10 classes", "discrete cosine"):
        assert words in page.text


def test_a_distance_over_vgg_is_no_fid(one, several):
    _, page = one
    assert "it is no FID" in page.text
    assert not re.search(r"(?<!no )(?<!r)FID", page.text)
    assert "rFID" not in page.text
    records, _, page = several
    headings = page.tables[0][0]
    assert headings[4:6] == ["Fréchet distance (VGG16)\xa0↓", "rFID (torch-fidelity)\xa0↓"]
    vgg, inception = zip(*(row[4:6] for row in page.tables[0][1:]), strict=True)
    distances = [f"{record['reconstruction']['frechet']:.2f}" for record in records]
    assert [cell.strip("*") for cell in vgg] == [*distances[:2], "–"]
    assert inception == ("–", "–", distances[2])


def test_pictures_lie_in_the_page_beside_what_they_are_compared_with(one, tmp_path):
    record = make_record(0)
    folder = write_evaluation(tmp_path / "e", record, images=2)
    page = page_of(tmp_path, (record, folder))
    images = iter(page.of("img"))
    wanted = [f"{name}-{n}" for n in range(2) for name in ("input", "reconstruction", "pca")]
    for t in TRANSFORMATIONS:
        wanted += [f"{t}-{name}-{n}" for n in range(2) for name in ("target", "decoded")]
    for name, image in zip(wanted, images, strict=True):
        assert same(pixels(image["src"]), stored(folder, name)), name
        assert (image["width"], image["height"]) == ("16", "16")
        assert image["alt"] == name.replace("-", " ")


def test_large_pictures_are_made_small(tmp_path):
    record = make_record(transformations=[])
    folder = write_evaluation(tmp_path / "e", record)
    ramp = np.linspace(0, 255, 640).astype(np.uint8)
    wide = np.stack([np.tile(ramp, (320, 1))] * 3, axis=-1)
    Image.fromarray(wide).save(folder / "pictures" / "input-0.png")
    Image.fromarray(wide[:, : SMALL + 1]).save(folder / "pictures" / "reconstruction-0.png")
    large, middle, small = page_of(tmp_path, (record, folder)).of("img")
    assert (large["width"], large["height"]) == (str(MOST), str(MOST // 2))
    found = pixels(large["src"]).astype(int)
    assert np.abs(found[:, :, 0] - np.linspace(0, 255, MOST)).max() < 6
    assert pixels(middle["src"]).shape == (320, SMALL + 1, 3)
    assert middle["src"].startswith("data:image/webp")
    assert "class" not in middle
    assert small["class"] == "pixels"


def test_several_models_stand_behind_one_input_where_they_share_it(several):
    _, folders, page = several
    images = page.of("img")
    first = [pixels(image["src"]) for image in images[:5]]
    wanted = [(0, "input"), (0, "reconstruction"), (1, "reconstruction"), (2, "input"),
              (2, "reconstruction")]  # fmt: skip
    for found, (i, name) in zip(first, wanted, strict=True):
        assert same(found, stored(folders[i], f"{name}-0"))
    # 5 plain ones, 3 latents, and for the turn that one model alone was evaluated under, 2.
    assert len(images) == 5 + 3 + 5 * len(TRANSFORMATIONS) + 2
    turned = [pixels(image["src"]) for image in images[-2:]]
    assert same(turned[0], stored(folders[2], "r45-target-0"))
    assert same(turned[1], stored(folders[2], "r45-decoded-0"))


def test_tables_of_several_models(several):
    records, _, page = several
    quality, means, each = page.tables[:3]
    names = [row[0] for row in quality[1:]]
    assert names[0] == "Aruns/model0"
    assert names[1].startswith("Bruns/long")
    assert "…" in names[1]
    assert records[1]["name"] in page.text
    for row, record in zip(quality[1:], records, strict=True):
        assert row[1] == f"{record['reconstruction']['psnr']:.2f}"
        assert row[-3:] == [f"{record['errors'][k]:.3f}" for k in ("rotation", "flip", "scale")]
    groups = [row[0] for row in means if len(row) == 1]
    assert groups == ["rotations, mean", "flips, mean", "scales, mean"]
    assert means[2][1] == f"{records[0]['errors']['rotation']:.3f}"
    at = each.index(["scale 0.5"])
    for row, record in zip(each[at + 1 : at + 4], records, strict=True):
        t = record["transformations"][3]
        assert row[1] == f"{t['error']:.3f}"
        assert row[-3:] == [f"{t['psnr']:.2f}", f"{t['lpips']:.3f}", f"{t['ssim']:.3f}"]
    # Only the model that was evaluated under it has a row.
    at = each.index(["rotation 45°"])
    assert [row[0] for row in each[at + 1 :]] == ["Cruns/model2"]


def test_what_does_not_compare_is_said_and_has_no_best(several, tmp_path):
    records, folders, page = several
    assert "number of images: 1,000 (A, B); 50 (C)" in page.text
    assert "features of the Fréchet distance: vgg16 (A, B); torch-fidelity (C)" in page.text
    assert "These evaluations differ" in page.text
    assert "*" not in str(page.tables[:3])
    page = page_of(tmp_path, *list(zip(records, folders, strict=True))[:2])
    assert "differ" not in page.text
    pair = [record["reconstruction"] for record in records[:2]]
    rows = page.tables[0][1:]
    for column, key, better in ((1, "psnr", max), (2, "ssim", max), (3, "lpips", min),
                                (4, "frechet", min)):  # fmt: skip
        values = [of[key] for of in pair]
        best = values.index(better(values))
        assert rows[best][column].endswith("*"), key
        assert not rows[1 - best][column].endswith("*"), key


def test_models_have_the_same_letter_and_colour_everywhere(several):
    _, _, page = several
    badges = {a["style"] for a in page.of("span") if a.get("class") == "badge"}
    assert badges == {f"--tint:{colour(i)}" for i in range(3)}


@pytest.mark.parametrize("count", [1, 2])
def test_missing_figures_say_why(tmp_path, count):
    records = [without(make_record(i), "lpips", f"no weights {i}") for i in range(count)]
    for record in records:
        record["missing"]["velocity_irreducible_variance"] = "the images have no labels"
        record["latent"] |= {"velocity_irreducible_variance": None, "spectrum": None}
        record["latent"] |= {"histogram": None, "correlation": None, "intrinsic_dimension": None}
    page = page_of(tmp_path, *((record, tmp_path) for record in records))
    for i in range(count):
        assert f"no weights {i}" in page.text
    assert ("not available: no weights 0" in page.text) == (count == 1)  # on its tile
    assert page.text.count("the images have no labels") >= 2 * count
    heading, *rows = page.tables[0]
    column = [row[heading.index("LPIPS\xa0↓")] for row in rows if len(row) > 1]
    assert set(column) == {"–"}
    assert "TwoNN" not in page.text  # neither there nor missing
    assert page.of("img") == []
    assert "Pictures" not in page.text


def test_rows_are_as_wide_as_their_tables(any_page):
    for widths in any_page.widths:
        assert len(set(widths)) == 1


def test_a_figure_from_too_few_images_says_so(tmp_path):
    record = make_record(missing={"s0.25: lpips": "too small", "r45": "not square"})
    record["latent"]["velocity_irreducible_variance"]["determined"] = False
    page = page_of(tmp_path, (record, tmp_path))
    assert "10 classes, too low, for want of images of a class" in page.text
    assert "s0.25: LPIPS" in page.text


def test_names_are_no_markup(tmp_path):
    record = make_record(name=HOSTILE, missing={"lpips": HOSTILE, HOSTILE: "why"})
    record["reconstruction"]["lpips"] = None
    for part in ("model", "data", "protocol", "versions"):
        record[part] = {key: HOSTILE if isinstance(value, str) else value
                        for key, value in record[part].items()}  # fmt: skip
        record[part][HOSTILE] = HOSTILE
    record |= {"frechet": HOSTILE, "device": HOSTILE}
    for t in record["transformations"]:
        t["label"] = HOSTILE + t["name"]
    folder = write_evaluation(tmp_path / "e", record)
    for records in ([record], report.named_apart([record, record])):
        page = page_of(tmp_path, *((r, folder) for r in records))
        assert not page.of("script")
        assert page.text.count(HOSTILE) > 10
        assert all("alert" not in (v or "") for _, a in page.tags for v in a.values())


def test_a_damaged_picture_is_named(tmp_path):
    record = make_record()
    folder = write_evaluation(tmp_path / "e", record)
    (folder / "pictures" / "h-decoded-0.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"h-decoded-0.png is not a picture"):
        page_of(tmp_path, (record, folder))


def test_the_page_is_the_same_each_time(tmp_path):
    record = make_record()
    folder = write_evaluation(tmp_path / "e", record)
    for name in ("a", "b"):
        report.write_page([(record, folder)], tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("channels", [1, 2, 3, 16, 40])
def test_plots_of_any_number_of_channels(channels):
    record = make_record(channels=channels)
    histograms = Page(plots.histograms(record, "a"))
    words = histograms.text.split()
    assert [w for w in words if w == str(min(channels, plots.SHOWN) - 1)]
    if channels > plots.SHOWN:
        assert str(plots.SHOWN) not in words
    assert "channel" in Page(plots.correlations(record, "a")).text
    assert "channel" in Page(plots.moments(record, "a")).text


@pytest.mark.parametrize("reach", [(-6.3, 2.4), (-5, 5), (0.01, 0.09), (-3e4, 1e5), (7, 7.5)])
def test_histograms_have_two_ticks_or_more(reach):
    record = make_record(channels=2)
    edges = np.linspace(*reach, 25)
    record["latent"]["histogram"] = {"edges": edges.tolist(), "density": [[1.0] * 24] * 2}
    words = Page(plots.histograms(record, "a")).text.replace("−", "-").split()
    ticks = {float(word) for word in words} - {0, 1}
    ticks |= {0, 1} & {float(w) for w in words if words.count(w) > 2}  # which channels are, too
    assert len(ticks) >= 2
    assert all(reach[0] < tick < reach[1] for tick in ticks)


def test_the_dots_lie_where_the_figures_are():
    """Under one another from left to right by error, in the colours of their models."""
    records = [make_record(i) for i in range(2)]
    for i, record in enumerate(records):
        record["transformations"] = record["transformations"][2:3]
        record["transformations"][0]["error"] = [0.2, 0.8][i]
    page = Page(plots.by_transformation(records, "a", "error", "error"))
    assert "horizontal flip" in page.text
    dots = {}
    for use in page.of("use"):
        for i in range(2):
            if colour(i) in use.get("style", ""):
                dots[i] = float(use["x"]), float(use["y"])
    # The axis begins at 0: four times the error is four times as far from it.
    left = 0.27 * 360
    assert (dots[1][0] - left) / (dots[0][0] - left) == pytest.approx(4, abs=0.01)
    assert dots[1][1] > dots[0][1]
    nothing = [{**record, "transformations": []} for record in records]
    assert plots.by_transformation(nothing, "a", "error", "error") is None


def test_spectra_share_the_images():
    records = [make_record(i) for i in range(3)]
    assert Page(plots.spectra(records[:1], "a")).text.count("latent") == 1
    assert Page(plots.spectra(records, "a")).text.count("images") == 1
    records[2]["latent"]["spectrum"]["image"] = [1.0] * 31
    page = Page(plots.spectra(records, "a"))
    assert page.text.count("images") == 2
    assert [letter in page.text.split() for letter in "ABC"] == [True] * 3
    records[0]["latent"]["spectrum"] = None
    assert "A" not in Page(plots.spectra(records, "a")).text.split()
    assert plots.spectra(records[:1], "a") is None

"""The page of `recipe-run preview --html` in a real headless Chromium."""

import subprocess

import pytest

pytestmark = pytest.mark.browser
CHROMIUM = [
    "chromium",
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
]
CHROMIUM += ["--disable-background-networking", "--disable-component-update", "--hide-scrollbars"]
ROWS = [
    {"text": "<script>document.title = 'taken over'</script><img src=x onerror=\"document.title='taken over'\">"},
    {"text": "a very long word: " + "x" * 400},
    *({"text": f"document {n} " * n} for n in range(1, 30)),
]


@pytest.fixture
def page(run_recipe, tmp_path):
    page = tmp_path / "page.html"
    options = {"rows": ROWS, "dataset": {"format": "text"}, "training": {"max_length": 150}}
    assert run_recipe("--html", page, "-n", "9", command="preview", **options)[0].status == 0
    return page


def chromium(tmp_path, *arguments):
    done = subprocess.run(
        [*CHROMIUM, f"--user-data-dir={tmp_path / 'profile'}", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_scripts_of_the_data_are_text(page, tmp_path):
    dom = chromium(tmp_path, "--dump-dom", f"file://{page}")
    assert "<title>tiny: what the model will see</title>" in dom
    assert "&lt;script&gt;document.title = 'taken over'&lt;/script&gt;" in dom
    assert dom.count("<details") == 9
    assert dom.count("<rect") > 5
    assert '<span class="limit">max_length 150</span>' in dom


def test_page_fits_a_phone_and_a_desk(page, tmp_path):
    """No sideways scrolling: the text is as wide as the window, also with a word of 400 letters."""
    ruler = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script></body>"
    measured = tmp_path / "measured.html"
    measured.write_text(page.read_text().replace("<details>", "<details open>").replace("</body>", ruler))
    for width in (500, 1200):  # Chromium's window is no narrower than 500
        dom = chromium(tmp_path, f"--window-size={width},900", "--dump-dom", f"file://{measured}")
        assert f"<title>{width} of {width}</title>" in dom


def test_page_can_be_looked_at(page, tmp_path):
    picture = tmp_path / "page.png"
    chromium(tmp_path, "--window-size=500,1600", f"--screenshot={picture}", f"file://{page}")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000

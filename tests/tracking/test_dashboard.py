"""The dashboard as a person sees it, in a browser at a real server: a training that was stopped and resumed twice.

Its screenshots stay in ``screenshots/`` of the checkout, or where ONESTAGE_SCREENSHOTS says.
"""

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onestage.config import compose
from onestage.tracking import runs
from onestage.tracking.client import client
from onestage.tracking.dashboard import KIND_TAG, VIEW_TAG, experiment_page, home

EXPERIMENT = "looked at"
MODEL = "digits"
STEPS = 24
STOPS = (6, 14)
SCREENSHOTS = Path(os.environ.get("ONESTAGE_SCREENSHOTS") or Path(__file__).parents[2] / "screenshots")
PATIENCE_MS = 90_000
"""Two busy cores may take half a minute for a page."""


def test_an_experiment_has_the_view_of_detection_and_keeps_what_a_person_made_of_it(store: str) -> None:
    runs.open_run(store, "viewed", tags={})
    tags = client(store).get_experiment_by_name("viewed").tags
    state = json.loads(json.loads(tags[VIEW_TAG])["state"])
    assert {"metrics.`val/map`", "metrics.`val/map_50`", "metrics.`best/map`"} <= set(state["selectedColumns"])
    assert tags[KIND_TAG] == "custom_model_development"

    older = client(store).create_experiment("older")
    client(store).set_experiment_tag(older, "owner", "ann")
    runs.open_run(store, "older", tags={})
    assert {"owner", VIEW_TAG} <= client(store).get_experiment(older).tags.keys()
    client(store).set_experiment_tag(older, VIEW_TAG, "mine")
    runs.open_run(store, "older", tags={})
    assert client(store).get_experiment(older).tags[VIEW_TAG] == "mine"


def test_the_dashboard_opens_on_the_experiment_or_without_one_on_the_server(store: str) -> None:
    assert home(store, "http://ann:pw@h:5000", "not begun") == "http://h:5000"
    runs.open_run(store, "begun", tags={})
    number = client(store).get_experiment_by_name("begun").experiment_id
    assert home(store, "http://h:5000/", "begun").startswith(f"http://h:5000/#/experiments/{number}/runs?")


@pytest.fixture(scope="module")
def run_id(server: Any, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A training that SIGTERM stopped at two of its steps, and that was resumed each time; its model is champion."""
    from onestage.tracking.system import SystemMetrics

    storage = tmp_path_factory.mktemp("storage")
    settings = [
        f"data.root={digits}",
        f"storage={storage}",
        f"tracking.uri={server.uri}",
        f"tracking.experiment={EXPERIMENT}",
        "tracking.every_seconds=0",
        "cluster=none",
        "cluster.cpus_per_worker=1",
        "detector=yolov3_tiny",
        "detector.width=0.125",
        "detector.input_size=[96,96]",
        "augment=none",
        "data.num_workers=0",
        "data.batch_size=6",
        "trainer.num_pictures=2",
        f"trainer.max_epochs={STEPS // 4}",  # of 24 images
        "checkpoint.every_steps=1",
        "name=stopped and resumed twice",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SystemMetrics.__init__.__kwdefaults__, "every_s", 0.5)
        codes = [_train(settings, storage, stop_after=stop) for stop in (*STOPS, None)]
    assert codes == [75, 75, 0]
    [folder] = storage.glob("*/spool")
    run_id = folder.parent.name
    store = client(server.uri)
    store.create_registered_model(MODEL)
    model = runs.logged_model(server.uri, run_id)
    version = store.create_model_version(MODEL, model.artifact_location, run_id, model_id=model.model_id)
    store.set_registered_model_alias(MODEL, "champion", version.version)
    return run_id


def _train(settings: list[str], storage: Path, *, stop_after: int | None) -> int:
    from onestage.cluster.launch import launch

    over = threading.Event()

    def stop() -> None:
        while not over.wait(0.02):
            lines = [line for file in storage.glob("*/spool/metrics.jsonl") for line in file.read_text().splitlines()]
            if any(f'"step": {stop_after},' in line for line in lines):
                os.kill(os.getpid(), signal.SIGTERM)
                return

    resume = ["resume=last"] if any(storage.glob("*/checkpoints/last.ckpt")) else []
    if stop_after is not None:
        threading.Thread(target=stop, daemon=True).start()
    try:
        return launch(compose("train", [*settings, *resume])).exit_code
    finally:
        over.set()


@pytest.fixture(scope="module")
def person() -> Iterator["Person"]:
    """Somebody with a browser of 1600 by 1000 pixels."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("no chromium: apt-get install chromium")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])  # root's has none
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.set_default_timeout(PATIENCE_MS)
        yield Person(page)
        browser.close()


class Person:
    def __init__(self, page: Any) -> None:
        self.page = page

    def opens(self, address: str) -> None:
        self.page.goto("about:blank")  # else a new place in the same page keeps some of the last one
        self.page.goto(address)
        assistant = self.page.locator("button[aria-label='Close']").first
        # It opens by itself at an address of this machine, over a third of the page.
        for _ in range(40):
            if assistant.is_visible():
                assistant.click()
                return
            time.sleep(0.25)

    def sees(self, words: str | re.Pattern[str], *, within: str = "body") -> Any:
        found = self.page.locator(within).get_by_text(words).locator("visible=true").first
        found.wait_for()
        return found

    def sees_picture(self, place: str) -> None:
        picture = self.page.locator(place).first
        picture.wait_for()
        picture.scroll_into_view_if_needed()
        loaded = "place => document.querySelector(place)?.naturalWidth > 100"
        self.page.wait_for_function(loaded, arg=place)

    def keeps(self, name: str) -> None:
        self.page.wait_for_timeout(1500)  # what still moves comes to rest
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png")


def run_page(server: Any, run_id: str, tab: str = "") -> str:
    experiment = client(server.uri).get_experiment_by_name(EXPERIMENT).experiment_id
    return f"{server.uri}/#/experiments/{experiment}/runs/{run_id}{tab}?workflowType=machine_learning"


@pytest.mark.slow
def test_the_experiment_opens_on_its_runs_with_their_map(server: Any, run_id: str, person: Person) -> None:
    person.opens(experiment_page(server.uri, client(server.uri).get_experiment_by_name(EXPERIMENT).experiment_id))
    person.sees("stopped and resumed twice")
    for column in ("best/map", "val/map", "val/map_50", "val/map_75"):
        person.sees(re.compile(f"^{column}$"))
    best = client(server.uri).get_run(run_id).data.metrics["best/map"]
    person.sees(re.compile(f"^{re.escape(f'{best:.15g}'[:6])}"), within=".ag-center-cols-container")
    person.keeps("1_runs")


@pytest.mark.slow
def test_the_run_says_what_it_is_on_its_first_page(server: Any, run_id: str, person: Person) -> None:
    person.opens(run_page(server, run_id))
    person.sees(re.compile("Best validation: mAP 0"))
    person.sees(re.compile("digits/train"))
    person.keeps("2_run")


@pytest.mark.slow
def test_a_run_resumed_twice_shows_one_unbroken_history(server: Any, run_id: str, person: Person) -> None:
    person.opens(run_page(server, run_id, "/model-metrics"))
    for section in ("best", "train", "train/loss", "val", "val/ap"):
        person.sees(re.compile(rf"^{section}\s*\("))
    person.page.get_by_placeholder("Search metric charts").fill("train/")
    # Plotly's own of the charts in sight; MLflow gives each curve twice, once for what shows under the mouse.
    drawn = "Array.from(document.querySelectorAll('.js-plotly-plot'), chart => chart.data ?? [])"
    person.page.wait_for_function(f"() => {drawn}.filter(curves => curves.length > 0).length >= 3")
    person.keeps("3_one_history")
    titles = ("grad_norm", "loss", "lr")
    for title in titles:
        person.sees(re.compile(f"^{title}$"))
    charts = person.page.evaluate(
        f"() => {drawn}.map(curves => curves.map(({{x, y}}) => [Array.from(x), Array.from(y)]))"
    )
    for title, curves in zip(titles, charts, strict=False):
        assert curves and all(steps == list(range(STEPS)) for steps, _ in curves), title
    rates = charts[titles.index("lr")][0][1]
    warm = rates.index(max(rates))
    assert 0 < warm < STEPS - 1
    assert rates == sorted(rates[: warm + 1]) + sorted(rates[warm + 1 :], reverse=True)


@pytest.mark.slow
def test_its_pictures_are_seen_in_the_image_cards_and_among_its_artifacts(
    server: Any, run_id: str, person: Person
) -> None:
    person.opens(run_page(server, run_id, "/model-metrics"))
    person.page.get_by_placeholder("Search metric charts").fill("no such curve")  # of cards, pictures alone are left
    person.sees(re.compile("^dataset/(anchors|labels)$"))
    person.page.locator("[data-component-id='fullscreen_button_chartcard']").first.click()
    person.sees_picture("[role='dialog'] img")
    person.keeps("4_picture_card")

    person.opens(run_page(server, run_id, "/artifacts/evaluation/val/precision_recall.png"))
    person.sees_picture("img[src^='blob:']")
    person.keeps("5_artifact")
    person.opens(run_page(server, run_id, "/artifacts/ap_per_class.json"))
    for words in ("class", "AP", "truths"):
        person.sees(re.compile(f"^{words}$"))
    person.keeps("6_ap_per_class")


@pytest.mark.slow
def test_its_machine_is_seen_among_the_system_metrics(server: Any, run_id: str, person: Person) -> None:
    person.opens(run_page(server, run_id, "/system-metrics"))
    person.sees(re.compile(r"^system/\S+\s*\("))
    person.sees("cpu_utilization_percentage").scroll_into_view_if_needed()
    person.page.locator(".js-plotly-plot .scatterlayer .trace").first.wait_for(state="attached")
    person.keeps("7_system")


@pytest.mark.slow
def test_the_champion_is_seen_in_the_registry(server: Any, run_id: str, person: Person) -> None:
    person.opens(f"{server.uri}/#/models/{MODEL}?workflowType=machine_learning")
    person.sees(re.compile("champion"))
    person.sees(re.compile("Version 1"))
    person.keeps("8_champion")

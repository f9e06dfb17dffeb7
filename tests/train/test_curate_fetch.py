"""Images from URLs: limits on bytes, time, redirects and addresses; what was fetched goes into shards' reach."""

import http.server
import json
import threading
import time

import pytest

from train.data.curation import fetch as fetching
from train.data.curation.fetch import FetchLimits, Unreachable, fetch, public_address
from train.evaluate.planted_defects import planted

DISK = "file" + ":///etc/hostname"
LOCAL = FetchLimits(bytes=200_000, seconds=5.0, allow_private=True)


class Site(http.server.BaseHTTPRequestHandler):
    image = planted(0)[0].data
    asked: tuple[str, ...] = ()

    def do_GET(self):
        Site.asked = (*Site.asked, self.path)
        kind, _, rest = self.path[1:].partition("/")
        if kind == "to":
            self.answer(302, b"", Location=f"/to/{int(rest) - 1}" if int(rest) > 1 else "/image.jpg")
        elif kind == "away":
            self.answer(301, b"", Location=DISK)
        elif kind == "status":
            self.answer(int(rest), b"no")
        elif kind == "large":
            self.answer(200, bytes(200_001))
        elif kind == "short":
            self.answer(200, self.image[:100], **{"Content-Length": str(len(self.image))})
        elif kind == "slow":
            self.send_response(200)
            self.end_headers()
            try:
                for byte in self.image:  # a byte now and then, for hours
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.05)
            except OSError:
                return
        else:
            self.answer(200, self.image)

    def answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_an_image_comes_over_at_most_five_redirects(site):
    assert fetch(f"{site}/image.jpg", LOCAL) == Site.image
    assert fetch(f"{site}/Bild ä.jpg?q=\n1", LOCAL) == Site.image
    assert Site.asked[-1] == "/Bild%20%C3%A4.jpg?q=1"  # urlsplit drops line ends, as browsers do
    assert fetch(f"{site}/to/5", LOCAL) == Site.image
    with pytest.raises(Unreachable, match="more than 5 redirects"):
        fetch(f"{site}/to/6", LOCAL)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("status/404", "HTTP 404"),
        ("status/204", "HTTP 204"),
        ("large", "more than 200000 bytes"),
        ("short", r"ended after 100 of \d+ bytes"),
        ("away", "expected http or https and a host, got 'file'"),
    ],
)
def test_what_is_no_image_says_why(site, path, why):
    with pytest.raises(Unreachable, match=why):
        fetch(f"{site}/{path}", LOCAL)


def test_a_server_that_drips_is_left_in_time(site):
    begin = time.monotonic()
    with pytest.raises(Unreachable, match=r"took longer than 0\.3 s"):
        fetch(f"{site}/slow", FetchLimits(seconds=0.3, allow_private=True))
    assert time.monotonic() - begin < 60  # the image would take a quarter of an hour


@pytest.mark.parametrize(
    "url", ["ftp://a/b.jpg", DISK, "a.jpg", "http:///a.jpg", "http://[::1/a.jpg", "http://u:p@h/a"]
)
def test_other_urls_are_not_asked(url):
    with pytest.raises(Unreachable, match=r"expected http|not a URL|with a user name"):
        fetch(url, LOCAL)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
     "::1", "fe80::1%eth0", "fc00::1", "::ffff:10.0.0.1", "255.255.255.255"],
)  # fmt: skip
def test_addresses_that_are_not_public_are_refused(address, monkeypatch):
    """Where one of several is not, too: a name may lead to both."""
    answers = [(2, 1, 6, "", ("93.184.216.34", 80)), (2, 1, 6, "", (address, 80))]
    monkeypatch.setattr(fetching.socket, "getaddrinfo", lambda *_, **__: answers)
    with pytest.raises(Unreachable, match=r"'host' is at .*, which is not public \(--allow-private\)"):
        public_address("host", 80, False)
    assert public_address("host", 80, True) == "93.184.216.34"
    monkeypatch.setattr(fetching.socket, "getaddrinfo", lambda *_, **__: answers[:1])
    assert public_address("host", 80, False) == "93.184.216.34"


def test_private_addresses_are_not_even_connected_to(site):
    before = Site.asked
    with pytest.raises(Unreachable, match="which is not public"):
        fetch(f"{site}/image.jpg", FetchLimits())
    with pytest.raises(Unreachable, match=r"no address of 'nowhere\.invalid'"):
        fetch("http://nowhere.invalid/a.jpg", FetchLimits())
    assert Site.asked == before


def test_a_list_of_urls_becomes_records_and_shards(site, tmp_path):
    pytest.importorskip("pyarrow")
    from train.__main__ import main
    from train.data.curation.manifest import Curation
    from train.data.shards import ShardSet

    path, out = tmp_path / "urls.jsonl", tmp_path / "out"
    rows = [{"url": f"{site}/{name}", "caption": f"of {name}"} for name in ("a.jpg", "status/404", "to/2", "large")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "curate",
        str(path),
        str(out),
        "--inline",
        "--nsfw",
        "none",
        "--embedding",
        "none",
        "--max-bytes",
        "200000",
    ]
    assert main([*words, "--allow-private"]) == 0
    records = list(Curation(out).records())
    assert [r.failure for r in records] == [None, "not fetched: HTTP 404", None, "not fetched: more than 200000 bytes"]
    assert [Curation(out).image(r) for r in records if r.failure is None] == [Site.image, Site.image]
    assert Curation(out).manifest["failures"] == {"not fetched": 2}
    shards = ["shards", "--curated", str(out), "--bases", "64", "--aspects", "1:1", "--out", str(tmp_path / "shards")]
    assert main(shards) == 0
    assert ShardSet(tmp_path / "shards").manifest["samples"] == 2

"""The browser that the other tests here use."""

import http.server
import threading

import pytest

pytestmark = pytest.mark.browser


def test_browser_runs_the_scripts_of_a_served_page(browser):
    """A page of this machine is fetched, its script runs, and what it shows can be asked for."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<p id=p></p><script>document.getElementById('p').textContent = 2 * 21</script>")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.server_address[1]}/")
        assert page.inner_text("#p") == "42"
        page.close()
        server.shutdown()

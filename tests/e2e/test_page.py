"""The state behind the page at /."""

import httpx


def test_state_is_for_operators(server, start_server):
    open_to_all = httpx.get(server.url + "/state", timeout=30)
    assert open_to_all.status_code == 200
    state = open_to_all.json()
    assert sum(node["pinned"] for node in state["prefix_tree"]) >= 1
    assert state["kv_bytes_read"] <= state["kv_bytes_read_unshared"]
    kept = start_server("--api-key", "user", "--admin-key", "admin", "-c", "2048")
    assert httpx.get(kept.url + "/", timeout=30).status_code == 200, "the page itself tells nothing"
    for key, status in ((None, 401), ("user", 403), ("admin", 200)):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        assert httpx.get(kept.url + "/state", headers=headers, timeout=30).status_code == status
    assert kept.stop() == 0

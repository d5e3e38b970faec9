"""The word that a promotion passes on: each is heard once, and only by those that it concerns."""

import json

import pytest

from cluster.standing import Standing, Word

STANDING = Standing({"live": 2, "canary": 3}, {"canary_share.3": "0.2"}, 17)


def test_a_word_is_heard_once_by_each(home):
    early, other = Word("http://a"), Word("http://b")
    assert early.hear() is None
    Word("http://a").spread({"helpdesk": STANDING})
    assert early.hear() == {"helpdesk": STANDING}
    assert early.hear() is None
    assert other.hear() is None, "it is about another registry"
    assert Word("http://a").hear() is None, "who comes later asks the registry itself"
    for number in range(5):
        early.spread({"helpdesk": Standing({"live": number}, {}, 0)})
        assert early.hear()["helpdesk"].aliases == {"live": number}


@pytest.mark.parametrize("text", ["", "[]", "{", '{"url": "http://a"}', '{"url": "http://a", "standings": {"x": 1}}', "\\xff"])
def test_what_is_no_word_is_not_heard(text, home):
    word = Word("http://a")
    home.mkdir(exist_ok=True)
    (home / "standings.json").write_bytes(text.encode("latin-1"))
    assert word.hear() is None
    word.spread({})
    assert word.hear() == {}
    assert json.loads((home / "standings.json").read_text())["url"] == "http://a"

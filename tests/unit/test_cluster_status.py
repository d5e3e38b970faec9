"""The tables of `python -m cluster status`, from what the dashboard says."""

from cluster.status import _cards


def test_only_a_card_whose_raylet_is_listed_as_alive_is_up(up):
    session = up()
    alive = {"labels": {"card": "card0"}, "state": "ALIVE"}
    dead = {"labels": {"card": "card1"}, "state": "DEAD"}
    for raylets in ([alive, dead], [alive]):
        assert list(_cards(session, raylets, {}).columns[-1].cells) == ["up", "[red]gone[/]"]
    assert list(_cards(session, [alive, dead, {**dead, "state": "ALIVE"}], {}).columns[-1].cells) == ["up", "up"]

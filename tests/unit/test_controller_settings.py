"""Ports, addresses and options of the controller."""

import argparse
import socket
from pathlib import Path

import pytest

from cloud import supervise
from cloud.broker import bracket, external_broker
from cloud.config import (
    Ports,
    Settings,
    add_options,
    choose_ports,
    hosts_of,
    keep_ports,
    resolve_address,
    settings_from,
)
from skills.errors import Unreachable, UsageError


def settings(data: Path, **more: int | None) -> Settings:
    return Settings(data=data, **more)  # type: ignore[arg-type]


def test_ports_are_remembered_for_devices_know_them(tmp_path: Path) -> None:
    first = choose_ports(settings(tmp_path, api_port=0, mqtt_port=0, tail_port=0))
    keep_ports(tmp_path, first)
    assert choose_ports(settings(tmp_path, api_port=0, mqtt_port=0, tail_port=0)) == first
    assert choose_ports(settings(tmp_path)) == first


def test_a_remembered_port_that_is_taken_is_said_not_replaced(tmp_path: Path) -> None:
    ports = choose_ports(settings(tmp_path, api_port=0, mqtt_port=0, tail_port=0))
    keep_ports(tmp_path, ports)
    with (
        socket.create_server(("127.0.0.1", ports.mqtt)),
        pytest.raises(Unreachable, match=f":{ports.mqtt}.*--mqtt-port"),
    ):
        choose_ports(settings(tmp_path))


def test_a_usual_port_that_is_taken_is_replaced_at_the_first_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = [Unreachable("taken")]

    def check(listen: str, port: int, what: str, option: str) -> None:
        if port == Ports().api and taken:
            raise taken.pop()

    monkeypatch.setattr("cloud.config.check_port", check)
    ports = choose_ports(settings(tmp_path))
    assert ports.api != Ports().api
    assert ports.mqtt == Ports().mqtt


def test_two_doors_cannot_share_a_port(tmp_path: Path, free_port: int) -> None:
    with pytest.raises(UsageError, match="three different ports"):
        choose_ports(settings(tmp_path, api_port=free_port, mqtt_port=free_port, tail_port=0))


def test_a_command_line_made_of_settings_gives_the_same_settings(tmp_path: Path) -> None:
    made = Settings(tmp_path, "127.0.0.1", 0, 1, 65535, "mqtts://b:1", True, "postgresql://x/y", "debug")
    parser = argparse.ArgumentParser()
    add_options(parser)
    assert settings_from(parser.parse_args(supervise.options(made))) == made


def test_a_port_beyond_the_range_is_refused(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_options(parser)
    with pytest.raises(UsageError, match="--api-port 70000 is no port"):
        settings_from(parser.parse_args(["--data", str(tmp_path), "--api-port", "70000"]))


def test_an_address_that_names_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="is not known here"):
        resolve_address("no.such.host.invalid")


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1"])  # for documentation: nobody has them
def test_an_address_of_another_machine_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match=f"cannot listen on {address}: .*give an address of this machine"):
        resolve_address(address)


def test_devices_are_told_an_address_that_they_can_reach() -> None:
    assert hosts_of("192.168.1.5") == ("192.168.1.5",)
    assert hosts_of("0.0.0.0")[0] != "0.0.0.0"  # noqa: S104 - compared


@pytest.mark.parametrize(
    "url", ["mqtt://b:1", "b", "mqtts://", "mqtts://u:p@b", "mqtts://b:99999", "https://b", "mqtts://b/x"]
)
def test_a_broker_that_would_not_know_clients_by_certificate_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="expected mqtts://HOST:PORT"):
        external_broker(url)


def test_an_external_broker_is_taken_by_its_url() -> None:
    assert external_broker("mqtts://broker.example").url == "mqtts://broker.example:8883"
    assert bracket("::1") == "[::1]"

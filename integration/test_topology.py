"""Plan, apply and drift against a real RabbitMQ with its management API."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from urllib.parse import urlsplit

import amqp
import pytest
from kombu import Connection
from raw import Sender
from servers import free_port, start_broker, wait_for
from workers import Load, Worker, environment

from celery_dlx.brokers.rabbitmq.inspect import arguments_over_amqp, by_management
from celery_dlx.brokers.rabbitmq.management import Management
from celery_dlx.topology.live import has_net


@pytest.fixture(scope="module")
def rabbitmq():
    """A broker without the thousands of queues of the other tests: each policy that is set is matched with each queue."""
    broker = start_broker("rabbitmq")
    yield broker
    broker.stop()


@pytest.fixture
def management(rabbitmq):
    if not rabbitmq.management_url:
        pytest.fail("name the broker's management API: DLX_TEST_RABBITMQ_MANAGEMENT=http://…")
    client = Management(rabbitmq.management_url, "guest", "guest", "/")
    yield client
    client.close()


@pytest.fixture
def channel(rabbitmq):
    with Connection(rabbitmq.url) as connection:
        yield connection.default_channel


@pytest.fixture
def shop(rabbitmq, tmp_path):
    """Runs `dlx topology …` with a policy file; `policy` may be written anew."""

    class Shop:
        policy = tmp_path / "policy.yaml"

        def __init__(self) -> None:
            self.env = environment(
                rabbitmq.url, CELERY_DLX_POLICY=str(self.policy), CELERY_DLX_MANAGEMENT_URL=rabbitmq.management_url
            )

        def run(self, *arguments: str, expect: int | None = None, **env: str) -> subprocess.CompletedProcess:
            command = [sys.executable, "-m", "celery", "-A", "matrix_app", "dlx", *arguments]
            done = subprocess.run(command, env={**self.env, **env}, capture_output=True, text=True, timeout=120)
            assert "Traceback" not in done.stderr, done.stderr
            if expect is not None:
                assert done.returncode == expect, f"{arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
            return done

        def plan(self, *arguments: str, expect: int) -> list[dict]:
            done = self.run("topology", "plan", "--json", *arguments, expect=expect)
            return [json.loads(line) for line in done.stdout.splitlines()]

        def apply(self, *arguments: str, expect: int = 0) -> list[dict]:
            done = self.run("topology", "apply", "--json", "--yes", *arguments, expect=expect)
            return [json.loads(line) for line in done.stdout.splitlines()]

        def applying(self, channel, queue: str, count: int) -> subprocess.Popen:
            """An `apply` that has many live queues to cover, under way."""
            for number in range(count):
                declare(channel, f"{queue}.{number}")
            self.policy.write_text(f"version: 1\nqueues: {{{queue}.*: {{}}}}\n")
            command = [sys.executable, "-m", "celery", "-A", "matrix_app", "dlx", "topology", "apply", "--json"]
            return subprocess.Popen(command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return Shop()


def codes(rows: list[dict], *types: str) -> set[str]:
    return {row["code"] for row in rows if row["type"] in (types or ("step", "finding"))}


def declare(channel, name: str, kind: str = "classic", **arguments) -> None:
    channel.queue_declare(name, durable=True, auto_delete=False, arguments={"x-queue-type": kind, **arguments})


def test_forty_live_queues_are_covered_while_they_work(rabbitmq, queue, channel, management, shop):
    names = [f"{queue}.{'cq'[number % 2]}.{number}" for number in range(40)]
    for name in names:
        declare(channel, name, "quorum" if ".q." in name else "classic")
    consumed, classic, quorum = names[:-2], names[-2], names[-1]
    management.put(
        "policies", "/", f"{queue}-ops",
        body={"pattern": f"^{queue}\\.[cq]", "definition": {"max-length": 50, "message-ttl": 10_000},
              "apply-to": "queues", "priority": 7},
    )  # fmt: skip
    text = f"version: 1\nqueues:\n  {queue}.c.*: {{max_deliveries: 3}}\n  {queue}.q.*: {{type: quorum, max_deliveries: 3}}\n"
    shop.policy.write_text(text)
    with Worker(rabbitmq.url, consumed, policy=text) as worker, Load(rabbitmq.url, consumed) as load:
        assert "dlx topology apply" in worker.output
        before = shop.plan(expect=1)
        assert {"DLX103", "DLX110"} <= codes(before, "step"), "two queues without a worker, forty without the broker's net"
        assert sum(row["code"] == "DLX110" for row in before if row["type"] == "step") == 40
        applied = shop.apply()
        assert applied[-1]["probe"] == "ok"
        assert shop.plan(expect=0)[-1]["in_line"] is True
        assert shop.apply()[-1]["applied"] == 0, "a second time there is nothing to do"

        live = by_management(management, "celery.dlx")
        for name in names:
            found = live.queues[name]
            assert (found.setting("max-length"), found.setting("message-ttl")) == (50, 10_000), (
                "what somebody set still counts"
            )
            assert has_net(found, "celery.dlx")
            assert found.setting("delivery-limit") == (2 if found.type == "quorum" else None)

        assert live.queues[f"{names[0]}.dlq"].setting("max-length") == 100_000, "that policy matches the DLQs too"

        sender = Sender(rabbitmq.url)
        for number in range(52):
            sender.task(classic, "matrix_app.ok", [number])
        sender.task(quorum, "matrix_app.ok", ["poison"])
        tag = wait_for(lambda: channel.basic_get(quorum), "the message to return").delivery_tag
        channel.basic_reject(tag, requeue=True)
        for _ in range(2):
            channel.basic_reject(wait_for(lambda: channel.basic_get(quorum), "again").delivery_tag, requeue=True)
        sender.task(consumed[0], "matrix_app.fail")
        reasons = lambda name: sorted({letter["reason"] for letter in worker.letters(name)})  # noqa: E731
        wait_for(lambda: reasons(classic) == ["expired", "maxlen"], lambda: f"{reasons(classic)}")
        wait_for(lambda: reasons(quorum) == ["max_deliveries"], lambda: f"{reasons(quorum)}")
        wait_for(lambda: reasons(consumed[0]) == ["failure"], lambda: f"{reasons(consumed[0])}")
        for letter in worker.letters(classic):
            assert letter["queue"] == classic
        at = load.sent
        wait_for(lambda: load.sent > at + 40, "the load to go on")
    assert load.errors == []
    assert "PRECONDITION_FAILED" not in worker.output.split(" ready.", 1)[1]

    # A worker that starts now finds every queue covered.
    worker = Worker(rabbitmq.url, consumed, policy=text, CELERY_DLX_MANAGEMENT_URL=rabbitmq.management_url)
    with worker:
        assert "dlx topology apply" not in worker.output

    # Somebody changes the policy beneath: its new word is carried over.
    management.put(
        "policies", "/", f"{queue}-ops",
        body={"pattern": f"^{queue}\\.[cq]", "definition": {"max-length": 60}, "apply-to": "queues", "priority": 7},
    )  # fmt: skip
    drift = [row for row in shop.plan(expect=1) if row["type"] == "step"]
    assert {row["code"] for row in drift} == {"DLX120"}
    assert len(drift) == 40, "the DLQs, which the policy matches too, are not its business"
    assert f"max-length: 50 → 60 (policy '{queue}-ops' says so)" in drift[0]["note"]
    assert "message-ttl: 10000 → None" in drift[0]["note"]
    shop.apply()
    found = by_management(management, "celery.dlx").queues[names[0]]
    assert (found.setting("max-length"), found.setting("message-ttl")) == (60, None)
    shop.plan(expect=0)

    # And one that is put above ours is seen, and gone around.
    high = {"pattern": f"^{queue}\\.c\\.0$", "definition": {"max-length": 9}, "apply-to": "queues", "priority": 99}
    management.put("policies", "/", f"{queue}-high", body=high)
    assert codes(shop.plan(expect=1), "step") == {"DLX121"}
    shop.apply()
    assert by_management(management, "celery.dlx").queues[names[0]].setting("max-length") == 9
    shop.plan(expect=0)
    for name in ("high", "ops"):
        management.delete("policies", "/", f"{queue}-{name}")


def test_names_that_are_hard_to_quote(rabbitmq, queue, channel, management, shop):
    name = f"{queue}.a.b/c[1]*+ü %"
    declare(channel, name)
    declare(channel, f"{queue}xaxb/c1+ü %")
    shop.policy.write_text(json.dumps({"version": 1, "queues": {name.replace("[", "[[]").replace("*", "[*]"): {}}}))
    shop.plan(expect=1)
    shop.apply()
    shop.plan(expect=0)
    live = by_management(management, "celery.dlx")
    assert has_net(live.queues[name], "celery.dlx")
    assert not has_net(live.queues[f"{queue}xaxb/c1+ü %"], "celery.dlx"), "no other queue is matched"
    channel.basic_publish(amqp.Message(b"{}", expiration="1"), "", name)
    wait_for(lambda: channel.queue_declare(f"{name}.dlq", passive=True).message_count == 1, "the message to expire")
    shop.run("topology", "destroy", "--yes", expect=1)
    assert f"{name}.dlq" in by_management(management, "celery.dlx").queues, "it holds a letter"
    channel.queue_purge(f"{name}.dlq")
    shop.run("topology", "destroy", "--yes", "--queue", name)
    live = by_management(management, "celery.dlx")
    assert f"{name}.dlq" not in live.queues
    assert not has_net(live.queues[name], "celery.dlx")
    assert name in live.queues, "source queues are not ours to delete"


def test_via_policy_declares_plainly_and_covers_beforehand(rabbitmq, queue, channel, management, shop):
    text = f"version: 1\ntopology: {{via: policy}}\nqueues: {{{queue}: {{message_ttl: 1s}}}}\n"
    shop.policy.write_text(text)
    shop.plan(expect=1)
    shop.apply()
    shop.plan(expect=0)
    worker = Worker(rabbitmq.url, [queue], policy=text, CELERY_DLX_MANAGEMENT_URL=rabbitmq.management_url)
    with worker:
        channel.queue_declare(queue, durable=True, auto_delete=False)  # 406 if it carried arguments
        assert "dlx topology apply" not in worker.output
        Sender(rabbitmq.url).task(queue, "matrix_app.fail")
        assert worker.wait_letters(queue, 1)[0]["reason"] == "failure"
    shop.plan(expect=0)
    Sender(rabbitmq.url).task(queue, "matrix_app.ok")
    wait_for(lambda: [x["reason"] for x in worker.letters(queue)] == ["failure", "expired"], worker.letters)


def test_without_management_it_says_what_to_run(queue, channel, management, shop):
    declare(channel, queue, "quorum", **{"x-max-length": 5})
    shop.policy.write_text(f"version: 1\nqueues: {{{queue}: {{}}}}\n")
    done = shop.run("topology", "plan", expect=1, CELERY_DLX_MANAGEMENT_URL="")
    assert "DLX131" in done.stdout
    done = shop.run("topology", "apply", expect=1, CELERY_DLX_MANAGEMENT_URL="")
    (line,) = [line for line in done.stderr.splitlines() if "rabbitmqctl" in line]
    assert f"rabbitmqctl set_policy -p / celery-dlx.{queue} '^{queue}$'" in line
    assert '"dead-letter-exchange": "celery.dlx"' in line
    assert channel.queue_declare(f"{queue}.dlq", passive=True), "what AMQP can do was done"


def test_arguments_can_be_found_over_amqp(rabbitmq, queue):
    from celery_dlx.brokers.rabbitmq.declare import SideChannel

    given = {"x-queue-type": "quorum", "x-max-length": 7, "x-message-ttl": 9000, "x-dead-letter-exchange": "other"}
    with Connection(rabbitmq.url) as connection:
        connection.connect()
        with SideChannel(connection.connection) as side:
            side.channel.queue_declare(queue, durable=True, auto_delete=False, arguments=given)
            found = arguments_over_amqp(side, queue, {"x-max-length": 8, "x-dead-letter-routing-key": queue})
            assert (found.type, found.arguments) == ("quorum", given)
            assert arguments_over_amqp(side, f"{queue}.none", {}) is None
            with suppress(amqp.exceptions.NotFound):
                side.channel.queue_declare(f"{queue}.none", passive=True)
                pytest.fail("looking at a queue made it")


def test_somebody_elses_dead_lettering_is_respected(queue, channel, management, shop):
    declare(channel, f"{queue}.args", **{"x-dead-letter-exchange": "amq.fanout"})
    declare(channel, f"{queue}.policy")
    management.put("policies", "/", f"{queue}-ops",
                   body={"pattern": f"^{queue}\\.policy$", "definition": {"dead-letter-exchange": "amq.topic"},
                         "apply-to": "queues"})  # fmt: skip
    shop.policy.write_text(f"version: 1\nqueues: {{{queue}.*: {{}}}}\n")
    shop.apply(expect=1)
    rows = shop.plan(expect=1)
    assert {row["subject"] for row in rows if row.get("code") == "DLX111"} == {f"{queue}.args", f"{queue}.policy"}
    assert codes(rows, "step") == set()
    assert by_management(management, "celery.dlx").queues[f"{queue}.policy"].setting("dead-letter-exchange") == "amq.topic"
    management.delete("policies", "/", f"{queue}-ops")


def test_at_least_once_is_refused_where_it_would_fall_back(queue, channel, management, shop):
    declare(channel, f"{queue}.classic")
    declare(channel, f"{queue}.drop", "quorum", **{"x-overflow": "drop-head"})
    declare(channel, f"{queue}.good", "quorum")
    shop.policy.write_text(f"version: 1\nqueues: {{{queue}.*: {{dead_letter: {{strategy: at-least-once}}}}}}\n")
    shop.apply(expect=1)
    found = {
        row["subject"]: row["code"] for row in shop.plan(expect=1) if row["type"] == "finding" and row["severity"] != "info"
    }
    assert found == {f"{queue}.classic": "DLX150", f"{queue}.drop": "DLX151"}
    good = by_management(management, "celery.dlx").queues[f"{queue}.good"]
    assert good.setting("dead-letter-strategy") == "at-least-once"
    assert good.setting("overflow") == "reject-publish"
    channel.basic_publish(amqp.Message(b"{}", expiration="1"), "", f"{queue}.good")
    wait_for(lambda: channel.queue_declare(f"{queue}.good.dlq", passive=True).message_count == 1, "the message to arrive")


def test_a_dlq_that_deletes_what_is_read(rabbitmq, queue, channel, management, shop):
    """RabbitMQ from 4.0: twenty looks, and a letter is gone. Ours has no limit; another's is refused, and mended."""
    version = by_management(management, "celery.dlx").version
    declare(channel, queue)
    declare(channel, f"{queue}.dlq", "quorum")
    channel.basic_publish(amqp.Message(b"{}"), "", f"{queue}.dlq")
    shop.policy.write_text(f"version: 1\nqueues: {{{queue}: {{}}}}\n")
    done = shop.run("list", queue, CELERY_DLX_MANAGEMENT_URL="")
    if version < (4,):
        assert done.returncode == 0
    else:
        assert done.returncode == 1
        assert "delivery limit of 20, the default" in done.stderr
        shop.run("list", queue, "--force", expect=0, CELERY_DLX_MANAGEMENT_URL="")
    assert ("DLX106" in codes(shop.plan(expect=1), "step")) == (version >= (4,))
    shop.apply()
    shop.plan(expect=0)
    with Worker(rabbitmq.url, [queue], policy=shop.policy.read_text()) as worker:
        worker.dead.insist = not worker.env.get("CELERY_DLX_MANAGEMENT_URL")
        for _ in range(30):
            assert len(worker.letters(queue)) == 1
    shop.run("list", queue, expect=0)


def test_thirty_looks_at_a_dlq_of_ours_destroy_nothing(rabbitmq, queue):
    with Worker(rabbitmq.url, [queue], policy="version: 1\n") as worker:
        for number in range(5):
            Sender(rabbitmq.url).task(queue, "matrix_app.fail", [number])
        worker.wait_letters(queue, 5)
        for _ in range(30):
            assert len(worker.letters(queue)) == 5


def test_two_services_that_disagree(shop, queue, tmp_path):
    shop.policy.write_text(f"version: 1\nqueues: {{{queue}: {{max_deliveries: 3}}}}\n")
    other = tmp_path / "other.yaml"
    other.write_text(f"version: 1\nqueues: {{{queue[:-1]}*: {{max_deliveries: 4}}}}\n")
    (finding,) = [row for row in shop.plan("--with", str(other), expect=1) if row.get("code") == "DLX140"]
    assert str(shop.policy) in finding["message"]
    assert str(other) in finding["message"]
    assert "max_deliveries 3 and 4" in finding["message"]


class TestBadInput:
    @pytest.fixture(autouse=True)
    def _policy(self, shop, queue):
        shop.policy.write_text(f"version: 1\nqueues: {{{queue}: {{}}}}\n")

    def test_management_that_does_not_answer(self, shop):
        url = f"http://somebody:secret@127.0.0.1:{free_port()}"
        done = shop.run("topology", "plan", expect=69, CELERY_DLX_MANAGEMENT_URL=url)
        assert "the management API does not answer" in done.stderr
        assert "secret" not in done.stderr

    def test_management_with_wrong_credentials(self, shop, rabbitmq):
        url = rabbitmq.management_url.replace("//", "//somebody:secret@")
        done = shop.run("topology", "plan", expect=1, CELERY_DLX_MANAGEMENT_URL=url)
        assert "refuses user 'somebody'" in done.stderr
        assert "secret" not in done.stderr

    def test_something_else_than_management(self, shop, rabbitmq):
        done = shop.run("topology", "plan", CELERY_DLX_MANAGEMENT_URL=f"http://127.0.0.1:{urlsplit(rabbitmq.url).port}")
        assert done.returncode in (1, 69)
        assert len(done.stderr.splitlines()) == 1

    def test_a_user_without_the_right_to_set_policies(self, shop, queue, channel, management):
        declare(channel, queue)
        management.put("users", queue, body={"password": "pw", "tags": "management"})
        management.put("permissions", "/", queue, body={"configure": ".*", "write": ".*", "read": ".*"})
        url = shop.env["DLX_BROKER"].replace("guest:guest", f"{queue}:pw")
        done = shop.run("topology", "apply", expect=1, DLX_BROKER=url)
        assert "rabbitmqctl set_policy" in done.stderr
        management.put("users", queue, body={"password": "pw", "tags": ""})
        done = shop.run("topology", "plan", expect=1, DLX_BROKER=url)
        assert "rabbitmqctl set_user_tags" in done.stderr
        management.delete("users", queue)

    def test_a_vhost_with_odd_characters(self, shop, queue, management):
        vhost = f"{queue}/ü %2F"
        management.put("vhosts", vhost, body={})
        management.put("permissions", vhost, "guest", body={"configure": ".*", "write": ".*", "read": ".*"})
        from urllib.parse import quote

        url = shop.env["DLX_BROKER"].removesuffix("//") + "/" + quote(vhost, safe="")
        with Connection(url) as connection:
            declare(connection.default_channel, queue)
        shop.run("topology", "plan", expect=1, DLX_BROKER=url)
        shop.run("topology", "apply", expect=0, DLX_BROKER=url)
        shop.run("topology", "plan", expect=0, DLX_BROKER=url)
        management.delete("vhosts", vhost)

    def test_an_apply_that_was_interrupted_goes_on(self, shop, queue, channel, management):
        process = shop.applying(channel, queue, 60)
        for _ in range(40):
            assert process.stdout.readline()
        process.kill()
        process.wait()
        assert len(codes(shop.plan(expect=1), "step")) >= 1, "the fault happened: it was not done"
        assert shop.apply()[-1]["in_line"] is True
        shop.plan(expect=0)

    def test_an_apply_whose_broker_goes_is_run_again(self, shop, rabbitmq, queue):
        assert hasattr(rabbitmq, "crash"), "needs a broker of our own: unset DLX_TEST_RABBITMQ"
        with Connection(rabbitmq.url) as connection:
            process = shop.applying(connection.default_channel, queue, 60)
        for _ in range(20):
            assert process.stdout.readline()
        rabbitmq.crash()
        try:
            _, said = process.communicate(timeout=120)
        finally:
            rabbitmq.run()
        assert process.returncode == 69 and "Traceback" not in said, f"one line, and the right code: {said}"
        assert len(codes(shop.plan(expect=1), "step")) >= 1, "the fault happened: it was not done"
        assert shop.apply()[-1]["in_line"] is True
        shop.plan(expect=0)

    def test_a_policy_that_somebody_deletes_meanwhile_is_set_again(self, shop, queue, channel, management):
        process = shop.applying(channel, queue, 20)
        deleted = None
        for line in process.stdout:
            step = json.loads(line)
            if deleted is None and step.get("kind") == "policy":
                deleted = step["name"]
                management.delete("policies", "/", deleted)
        said = process.stderr.read()
        assert deleted is not None, "the fault happened"
        assert process.wait(60) in (0, 1) and "Traceback" not in said, said
        if process.returncode == 0:  # it was deleted before it was set
            shop.plan(expect=0)
        else:
            assert shop.apply()[-1]["in_line"] is True
        shop.plan(expect=0)


def test_the_environment_names_the_management_api(shop, rabbitmq, queue):
    shop.policy.write_text(
        f"version: 1\ntopology: {{management_url: 'http://127.0.0.1:{free_port()}'}}\nqueues: {{{queue}: {{}}}}\n"
    )
    assert os.environ.get("CELERY_DLX_MANAGEMENT_URL") is None
    assert shop.plan(expect=1)[-1]["version"]

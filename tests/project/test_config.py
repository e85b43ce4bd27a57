"""Settings and catalogue: defaults, and one line for every mistake."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import get_args

import pytest
from annotated_types import Ge, Le
from pydantic import ValidationError

from config.catalogue import TRUST_TIERS, Allowance, Catalogue, CatalogueError, Draw, Plan, load_catalogue
from config.settings import DEFAULT_CATALOGUE, Settings, SettingsError, load_settings, naming_servers, variable_name
from schemas.events import MAX_AMOUNT
from tests.support.paths import ROOT

# ---------------------------------------------------------------------------------------------------------------------
# Settings


def bounds_of(field: str) -> tuple[int | None, int | None]:
    """Smallest and greatest allowed value of a setting."""
    metadata = Settings.model_fields[field].metadata
    least = next((limit.ge for limit in metadata if isinstance(limit, Ge)), None)
    most = next((limit.le for limit in metadata if isinstance(limit, Le)), None)
    assert least is None or isinstance(least, int)
    assert most is None or isinstance(most, int)
    return least, most


def wrong_values() -> Iterator[tuple[str, str, str]]:
    """(field, a value it refuses, what the message must say is allowed), made from the settings themselves."""
    for field, info in Settings.model_fields.items():
        if info.annotation is int:
            least, most = bounds_of(field)
            yield field, "many", "integer"
            yield field, "1.5", "integer"
            if least is not None:
                yield field, str(least - 1), str(least)
            if most is not None:
                yield field, str(most + 1), str(most)
        elif info.annotation is bool:
            yield field, "maybe", "boolean"
        elif choices := [choice for choice in get_args(info.annotation) if isinstance(choice, str)]:
            yield field, "other", choices[0]
            yield field, "other", choices[-1]
    yield "queue_name", "two words", "[a-z0-9_-]"
    for tier in TRUST_TIERS:
        for value, allowed in (("-1", "0"), (str(10**12 + 1), str(10**12)), ("1.5", "integer"), ("many", "integer")):
            yield f"sponsor_daily_units_{tier}", value, allowed


def refused(environ: dict[str, str], **overrides: object) -> str:
    """The line that a wrong environment is refused with."""
    with pytest.raises(SettingsError) as caught:
        load_settings(environ, **overrides)
    return str(caught.value)


def test_defaults_need_no_environment() -> None:
    settings = load_settings({"PATH": "/bin", "HOME": "/root"})
    assert settings.redis_url == "redis://127.0.0.1:6379/0"
    assert settings.database_url is None
    assert settings.default_plan is None
    assert (settings.partitions, settings.redis_down, settings.billing_enabled) == (8, "ledger", True)
    assert (settings.event_max_age_days, settings.event_max_ahead_seconds) == (35, 300)
    assert (settings.outcome_ttl_seconds, settings.cache_ttl_ms) == (900, 60_000)
    assert (settings.drain_time_box_ms, settings.stop_timeout_seconds) == (2_000, 25)
    assert settings.catalogue_path == DEFAULT_CATALOGUE


def test_every_setting_is_read_from_its_own_variable() -> None:
    names = [variable_name(field) for field in Settings.model_fields]
    assert len(set(names)) == len(names)
    assert {name for name in names if not name.startswith("METERFALL_")} == {"REDIS_URL", "DATABASE_URL"}
    for field, info in Settings.model_fields.items():
        if info.annotation is int:
            least, _ = bounds_of(field)
            value = (least or 0) + 1
            assert getattr(load_settings({variable_name(field): str(value)}), field) == value
    chosen = load_settings(
        {
            "REDIS_URL": "redis://r/1",
            "DATABASE_URL": "postgresql://d/x",
            "METERFALL_REDIS_DOWN": "deny",
            "METERFALL_BILLING_ENABLED": "false",
            "METERFALL_DEFAULT_PLAN": "free",
            "METERFALL_CATALOGUE_PATH": "/etc/plans.toml",
            "METERFALL_QUEUE_NAME": "billing-1",
            "METERFALL_LOG_LEVEL": "ERROR",
            "METERFALL_SPONSOR_DAILY_UNITS_NEW": "0",
            "METERFALL_SPONSOR_DAILY_UNITS_ELITE": str(10**12),
        }
    )
    assert (chosen.sponsor_daily_units_new, chosen.sponsor_daily_units_elite) == (0, 10**12)
    assert (chosen.sponsor_daily_units_established, chosen.sponsor_daily_units_trusted) == (None, None)
    assert (chosen.redis_url, chosen.database_url) == ("redis://r/1", "postgresql://d/x")
    assert (chosen.redis_down, chosen.billing_enabled, chosen.default_plan) == ("deny", False, "free")
    assert (chosen.catalogue_path, chosen.queue_name, chosen.log_level) == (
        Path("/etc/plans.toml"), "billing-1", "ERROR",
    )  # fmt: skip


def test_our_own_names_win_over_those_that_a_platform_sets_for_all_its_programs() -> None:
    platform = {"DATABASE_URL": "postgresql://platform/db", "REDIS_URL": "redis://platform/0"}
    ours = {"METERFALL_DATABASE_URL": "postgresql://ours/db", "METERFALL_REDIS_URL": "redis://ours/0"}
    both = load_settings(platform | ours)
    assert (both.database_url, both.redis_url) == ("postgresql://ours/db", "redis://ours/0")
    empty = load_settings(platform | dict.fromkeys(ours, ""))
    assert (empty.database_url, empty.redis_url) == ("postgresql://platform/db", "redis://platform/0")
    # A child that must use other servers does, whatever the environment says.
    queue = {"METERFALL_QUEUE_REDIS_URL": "redis://queue/0"}
    child = load_settings(naming_servers(platform | ours | queue, "postgresql://child/db", "redis://child/0"))
    assert child.queue_redis_url is None
    assert (child.database_url, child.redis_url) == ("postgresql://child/db", "redis://child/0")


SECRETS = {
    "database_url": "postgresql://u:hunter2@h/db",
    "redis_url": "redis://:hunter2@h/0",
    "queue_redis_url": "redis://:hunter2@queue/0",
    "migrate_url": "postgresql://owner:hunter2@h/db",
    "signing_keys": f"one={'hunter2' * 8}",
}


@pytest.mark.parametrize("field", SECRETS)
def test_a_secret_may_be_in_a_file(field: str, tmp_path: Path) -> None:
    file, name = tmp_path / "secret", f"METERFALL_{field.upper()}"
    file.write_text(f"\n{SECRETS[field]}\n", encoding="utf-8")
    read = load_settings({f"{name}_FILE": str(file)} | {variable_name(field): ""})
    assert getattr(read, field) == getattr(load_settings({variable_name(field): SECRETS[field]}), field)

    assert f"{name} is set also" in refused({f"{name}_FILE": str(file), name: SECRETS[field]})
    assert "No such file" in refused({f"{name}_FILE": str(tmp_path / "missing")})
    for content, said in ((b" \n", "is empty"), (b"\xff", "UTF-8"), (b"hunter2", "must be")):
        file.write_bytes(content)
        message = refused({f"{name}_FILE": str(file)})
        assert said in message
        assert "hunter2" not in message


def test_what_a_redis_proves_itself_with_is_for_tls_and_exists(tmp_path: Path) -> None:
    assert "rediss://" in refused({"METERFALL_REDIS_TLS": "unverified"})
    secure = {"REDIS_URL": "rediss://h/0"}
    assert "PEM" in refused(secure | {"METERFALL_REDIS_TLS": str(tmp_path / "missing.pem")})
    assert load_settings(secure | {"METERFALL_REDIS_TLS": "unverified"}).redis_tls == "unverified"


@pytest.mark.parametrize(("field", "value", "allowed"), [*wrong_values()])
def test_a_wrong_value_is_one_line_that_names_the_variable_and_what_is_allowed(
    field: str, value: str, allowed: str
) -> None:
    message = refused({variable_name(field): value})
    assert message.startswith(f"{variable_name(field)}: ")
    assert "\n" not in message
    assert allowed in message
    assert repr(value) in message


def test_a_wrong_value_of_several_lines_is_still_one_line() -> None:
    assert "\n" not in refused({"METERFALL_PARTITIONS": "8\nMETERFALL_PARTITIONS=9"})


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("METERFALL_PARTITION", "METERFALL_PARTITIONS"),
        ("METERFALL_BATCH_MAX_EVENT", "METERFALL_BATCH_MAX_EVENTS"),
        ("METERFALL_SIGNING_KEY", "METERFALL_SIGNING_KEYS"),
        ("METERFALL_SIGNING_KEY_FILE", "METERFALL_SIGNING_KEYS_FILE"),
        ("METERFALL_DATABSE_URL_FILE", "METERFALL_DATABASE_URL_FILE"),
        ("METERFALL_DATABSE_URL", "METERFALL_DATABASE_URL"),
        ("METERFALL_MIGRATE_ULR", "METERFALL_MIGRATE_URL"),
        ("METERFALL_REDIS_TSL", "METERFALL_REDIS_TLS"),
        ("METERFALL_PAGR", "METERFALL_PAGER"),
        ("METERFALL_HTTP_PROT", "METERFALL_HTTP_PORT"),
    ],
)
def test_a_variable_that_is_almost_a_setting_is_refused(name: str, meant: str) -> None:
    assert refused({name: "8"}) == f"{name}: no such setting, is it {meant}? README.md lists them"
    assert refused({name: ""}).startswith(name)


FOREIGN = {
    "METERFALL_PORT": "tcp://10.0.0.7:80",
    "METERFALL_HTTP_PORT": "tcp://10.0.0.7:8080",
    "METERFALL_HTTP_SERVICE_HOST": "10.0.0.7",
    "METERFALL_REDIS_PORT": "tcp://10.0.0.8:6379",
    "METERFALL_DATABASE_SERVICE_PORT": "5432",
    "METERFALL_PORT_80_TCP_ADDR": "10.0.0.7",
    "METERFALL_SERVICE_HOST": "10.0.0.7",
    "METERFALL_SERVICE_PORT": "80",
    "METERFALL_SERVICE_PORT_HTTP": "80",
    "METERFALL_SERVE_PORT": "tcp://10.0.0.9:80",
    "METERFALL_SOMETHING_NEW": "1",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_variable_of_others_is_named_and_left_alone(name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert load_settings({name: FOREIGN[name]}) == load_settings({})
    assert caplog.messages == [f"no settings of this release, ignored: {name}"]


def test_variables_without_the_prefix_are_not_looked_at(caplog: pytest.LogCaptureFixture) -> None:
    assert load_settings({"METERFALLS": "8", "OTHER_PARTITIONS": "9"}).partitions == 8
    assert caplog.messages == []


def test_the_readme_lists_every_setting() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in map(variable_name, Settings.model_fields) if name not in readme] == []


def test_an_empty_variable_counts_as_unset() -> None:
    empty = dict.fromkeys(map(variable_name, Settings.model_fields), "")
    assert load_settings(empty) == load_settings({})


def test_overrides_win_and_are_checked_too() -> None:
    environ = {"METERFALL_PARTITIONS": "16", "REDIS_URL": "redis://environment/0"}
    settings = load_settings(environ, partitions=4, database_url=None)
    assert (settings.partitions, settings.redis_url) == (4, "redis://environment/0")
    assert refused(environ, partitions=0).startswith("METERFALL_PARTITIONS: ")
    assert refused(environ, partitons=4).startswith("METERFALL_PARTITONS: ")


def test_settings_are_frozen() -> None:
    settings = load_settings({})
    with pytest.raises(ValidationError, match="frozen"):
        settings.partitions = 9  # type: ignore[misc]
    assert settings.partitions == 8


# ---------------------------------------------------------------------------------------------------------------------
# Catalogue


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return load_catalogue(DEFAULT_CATALOGUE)


def edited(folder: Path, old: str, new: str) -> Path:
    """The shipped catalogue with one place changed."""
    text = DEFAULT_CATALOGUE.read_text(encoding="utf-8")
    assert text.count(old) >= 1
    path = folder / "catalogue.toml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    return path


def test_the_shipped_catalogue_has_the_meters_and_plans_of_the_design(catalogue: Catalogue) -> None:
    assert set(catalogue.meters) == {"server_kokoro", "premium_voice", "ocr_tokens", "credits", "relay_credits"}
    assert catalogue.spills == {code: code != "relay_credits" for code in catalogue.meters}
    assert set(catalogue.plans) == {"free", "basic", "plus", "max", "core", "pro", "max_relay", "tenant", "studio"}
    assert [catalogue.plan(code).tier for code in ("free", "basic", "plus", "max")] == [0, 1, 2, 3]
    for code in ("basic", "plus", "max"):
        assert catalogue.plan(code).meters["ocr_tokens"].rollover_cap == 10_000_000
        assert catalogue.plan(code).meters["premium_voice"].rollover_cap == 1_000_000


def test_the_relay_and_tenant_plans_are_those_of_the_design(catalogue: Catalogue) -> None:
    core, pro, unlimited = (catalogue.plan(code).meters["relay_credits"] for code in ("core", "pro", "max_relay"))
    assert (core.cadence, core.caps) == ("lifetime", {"backend": {"gemini": 100}})
    assert (pro.cadence, pro.caps) == ("monthly", {"backend": {"gemini": 1_000}})
    assert unlimited.quantity is None
    credits_of_a_tenant = catalogue.plan("tenant").meters["credits"]
    assert (credits_of_a_tenant.anchor, credits_of_a_tenant.rollover_cap) == ("floating", 0)


def test_one_wallet_of_the_studio_pays_for_three_meters(catalogue: Catalogue) -> None:
    assert (
        catalogue.draws("studio")
        == catalogue.draws("studio", on_trial=True)
        == {
            "server_kokoro": Draw("credits", "1"),
            "premium_voice": Draw("credits", "3"),
            "ocr_tokens": Draw("credits", "0.002"),
        }
    )
    assert catalogue.plans_with_wallets == {"studio"}
    assert catalogue.draws("basic") == catalogue.draws("gold") == {}
    granted = catalogue.plan("studio").meters
    assert (granted["credits"].quantity, granted["credits"].cadence) == (10_000, "monthly")


def test_the_sponsorship_pool_is_that_of_the_design(catalogue: Catalogue) -> None:
    pool = catalogue.sponsorship
    assert (pool.initial, pool.paid_share_percent) == (10_000, Decimal(10))
    assert pool.daily_budget == {"new": 0, "established": 50, "trusted": 200, "elite": 1_000}
    assert set(pool.daily_budget) == set(TRUST_TIERS)


def test_what_a_plan_leaves_out_has_a_default() -> None:
    plan = Plan.model_validate({"name": "Small", "tier": 0, "meters": {"credits": {}}})
    assert plan.meters["credits"] == Allowance(
        quantity=None, cadence="subscription", anchor="sticky", rollover_cap=0, caps={}
    )
    assert (plan.price_month_cents, plan.trial_days, plan.active) == (0, 0, True)


def test_a_model_that_is_not_listed_costs_one(catalogue: Catalogue) -> None:
    assert [catalogue.multiplier(slug) for slug in ("m1", "m2", "m2-turbo", "m3")] == ["1", "1.5", "0.75", "2.25"]
    unlisted: list[object] = ["m4", "", None, 3, True, 1.5, ["m2"]]
    assert {catalogue.multiplier(slug) for slug in unlisted} == {"1"}


def test_an_unknown_plan_is_answered_with_those_there_are(catalogue: Catalogue) -> None:
    with pytest.raises(CatalogueError, match=r"^plan: unknown code 'gold'; there are basic, .*, tenant$"):
        catalogue.plan("gold")


def test_the_catalogue_is_frozen(catalogue: Catalogue) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        catalogue.plans["basic"].meters["premium_voice"].quantity = 9  # type: ignore[misc]


BASIC_VOICE = "meters.premium_voice = { quantity = 100_000,"
MULTIPLIER = 'm2 = "1.5"'
STUDIO = "plans.studio.meters.premium_voice"
STUDIO_VOICE = 'meters.premium_voice = {{ wallet = "credits", {} }}'
VOICE_OF_STUDIO = STUDIO_VOICE.format('price = "3"')
CREDITS_OF_STUDIO = 'meters.credits = { quantity = 10_000, cadence = "monthly" }'


@pytest.mark.parametrize(
    ("old", "new", "path", "allowed"),
    [
        (BASIC_VOICE, "meters.voice = { quantity = 100_000,", "plans.basic.meters.voice", "premium_voice"),
        (BASIC_VOICE, BASIC_VOICE.replace("100", "-100"), "plans.basic.meters.premium_voice.quantity", "equal to 0"),
        (BASIC_VOICE, BASIC_VOICE.replace("100_000", "1_000_000_000_001"),
         "plans.basic.meters.premium_voice.quantity", str(MAX_AMOUNT)),
        (BASIC_VOICE, BASIC_VOICE.replace("100_000", "1.5"), "plans.basic.meters.premium_voice.quantity", "integer"),
        (BASIC_VOICE, BASIC_VOICE.replace("100_000", "true"), "plans.basic.meters.premium_voice.quantity", "integer"),
        (BASIC_VOICE, BASIC_VOICE.replace("quantity", "quantities"),
         "plans.basic.meters.premium_voice.quantities", "not permitted"),
        ('cadence = "lifetime"', 'cadence = "yearly"', "plans.core.meters.relay_credits.cadence", "'monthly'"),
        ('anchor = "floating"', 'anchor = "loose"', "plans.tenant.meters.credits.anchor", "'sticky' or 'floating'"),
        ("{ gemini = 100 }", "{ gemni = 100 }", "plans.core.meters.relay_credits.caps.backend", "gemini, hardware"),
        ("{ gemini = 100 }", "{ gemini = -1 }", "plans.core.meters.relay_credits.caps.backend.gemini", "equal to 0"),
        ("rollover_cap = 1_000_000 }", "rollover_cap = -1 }",
         "plans.basic.meters.server_kokoro.rollover_cap", "equal to 0"),
        (BASIC_VOICE, BASIC_VOICE + ' limits = [{ per = "year", amount = 5 }],',
         "plans.basic.meters.premium_voice.limits.0.per", "'day', 'week' or 'month'"),
        (BASIC_VOICE, BASIC_VOICE + ' limits = [{ per = "day", amount = 0 }],',
         "plans.basic.meters.premium_voice.limits.0.amount", "equal to 1"),
        (BASIC_VOICE, BASIC_VOICE + ' limits = [{ per = "day", amount = 2.5 }],',
         "plans.basic.meters.premium_voice.limits.0.amount", "integer"),
        (BASIC_VOICE, BASIC_VOICE + ' limits = [{ per = "day", amount = 5 }, { per = "day", amount = 6 }],',
         "plans.basic.meters.premium_voice.limits", "two limits per day; give at most one for each of day"),
        ("trial_days = 7", "trial_days = 366", "plans.basic.trial_days", "365"),
        ("price_month_cents = 900", "price_month_cents = 9.5", "plans.basic.price_month_cents", "integer"),
        ('name = "Basic"\n', "", "plans.basic.name", "required"),
        ("[plans.basic]", '[plans."Basic plan"]', "plans.Basic plan", "[a-z0-9_]"),
        ("[meters.credits]", "[meters.Credits]", "meters.Credits", "[a-z0-9_]"),
        (MULTIPLIER, 'm2 = "1,5"', "multipliers.m2", "pattern"),
        (MULTIPLIER, 'm2 = "1e3"', "multipliers.m2", "pattern"),
        (MULTIPLIER, 'm2 = "-1"', "multipliers.m2", "pattern"),
        (MULTIPLIER, 'm2 = ""', "multipliers.m2", "pattern"),
        (MULTIPLIER, 'm2 = "1.5\\n"', "multipliers.m2", "pattern"),
        (MULTIPLIER, 'm2 = "0.1234567"', "multipliers.m2", "pattern"),
        (MULTIPLIER, "m2 = 1.5", "multipliers.m2", "string"),
        (VOICE_OF_STUDIO, STUDIO_VOICE.format('price = "0"'), f"{STUDIO}.price", "decimal text above 0"),
        (VOICE_OF_STUDIO, STUDIO_VOICE.format('price = "0.000"'), f"{STUDIO}.price", "above 0"),
        (VOICE_OF_STUDIO, STUDIO_VOICE.format('price = "-3"'), f"{STUDIO}.price", "above 0"),
        (VOICE_OF_STUDIO, STUDIO_VOICE.format('price = "0.0000001"'), f"{STUDIO}.price", "6 digits on each side"),
        (VOICE_OF_STUDIO, STUDIO_VOICE.format('price = "1000000"'), f"{STUDIO}.price", "6 digits on each side"),
        (VOICE_OF_STUDIO, STUDIO_VOICE.format("price = 3"), f"{STUDIO}.price", "such as \"0.002\""),
        (VOICE_OF_STUDIO, STUDIO_VOICE.format("price = 0.5"), f"{STUDIO}.price", "decimal text"),
        (', price = "3"', "", STUDIO, "price: missing beside wallet"),
        ('wallet = "credits", price = "3"', 'price = "3"', STUDIO, "wallet: missing beside price"),
        (VOICE_OF_STUDIO, STUDIO_VOICE.format('price = "3", quantity = 5'), STUDIO, "quantity: must be left out"),
        (VOICE_OF_STUDIO, STUDIO_VOICE.format('price = "3", cadence = "monthly"'), STUDIO, "cadence: must be left out"),
        (VOICE_OF_STUDIO, VOICE_OF_STUDIO.replace("credits", "gold"), f"{STUDIO}.wallet", "credits, ocr_tokens"),
        (VOICE_OF_STUDIO, VOICE_OF_STUDIO.replace("credits", "premium_voice"), f"{STUDIO}.wallet", "itself"),
        (VOICE_OF_STUDIO, VOICE_OF_STUDIO.replace("credits", "relay_credits"), f"{STUDIO}.wallet", "add relay_"),
        (VOICE_OF_STUDIO, VOICE_OF_STUDIO.replace("credits", "ocr_tokens"), f"{STUDIO}.wallet", "draws on a wallet"),
        ("[meters.premium_voice]\n", '[meters.premium_voice]\nrounding = "up"\n', f"{STUDIO}.wallet", '"carry" to'),
        ("[meters.premium_voice]\n", '[meters.premium_voice]\nrounding = "down"\n', f"{STUDIO}.wallet", '"carry" to'),
        ("[backends.gemini]", "[backends.premium_voice]\nkind = \"hosted\"\n[backends.gemini]", f"{STUDIO}.wallet",
         "rename one of them"),
        (VOICE_OF_STUDIO, VOICE_OF_STUDIO + "\ntrial.days = 7"
         "\ntrial.meters.credits = { wallet = \"relay_credits\", price = \"1\" }"
         "\ntrial.meters.relay_credits = { quantity = 5 }",
         "plans.studio.trial.meters.credits.wallet", "credits is a wallet itself, that of ocr_tokens"),
        (VOICE_OF_STUDIO, VOICE_OF_STUDIO + "\ntrial.days = 7"
         "\ntrial.meters.relay_credits = { wallet = \"credits\", price = \"1\" }",
         "plans.studio.trial.meters.relay_credits.wallet", "relay_credits is no meter of the plan after its trial"),
        (CREDITS_OF_STUDIO, CREDITS_OF_STUDIO.replace(" }", ", caps.meter.relay_credits = 5 }"),
         "plans.studio.meters.credits.caps.meter", "'relay_credits' does not draw on credits"),
        (CREDITS_OF_STUDIO, CREDITS_OF_STUDIO.replace(" }", ", caps.meter.premium_voice = -1 }"),
         "plans.studio.meters.credits.caps.meter.premium_voice", "equal to 0"),
        (", elite = 1_000", "", "sponsorship.daily_budget.elite", "missing"),
        ("elite = 1_000", "elite = 1_000, royal = 9", "sponsorship.daily_budget.royal", "'elite'"),
        ("paid_share_percent = 10", "paid_share_percent = 2.5", "sponsorship.paid_share_percent", 'such as "2.5"'),
        ("paid_share_percent = 10", 'paid_share_percent = "2,5"', "sponsorship.paid_share_percent", 'such as "2.5"'),
        ("paid_share_percent = 10", 'paid_share_percent = "100.1"', "sponsorship.paid_share_percent", "equal to 100"),
        ("paid_share_percent = 10", "paid_share_percent = true", "sponsorship.paid_share_percent", "a whole number"),
        ("paid_share_percent = 10", "paid_share_percent = 101", "sponsorship.paid_share_percent", "equal to 100"),
        ('kind = "hosted"', 'kind = "cloud"', "backends.gemini.kind", "'hosted' or 'hardware'"),
        ("[sponsorship]", "[sponsor]", "sponsorship", "required"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_the_path_of_the_key_and_what_is_allowed(
    tmp_path: Path, old: str, new: str, path: str, allowed: str
) -> None:
    file = edited(tmp_path, old, new)
    with pytest.raises(CatalogueError) as caught:
        load_catalogue(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: {path}")
    assert allowed in message
    assert "\n" not in message


def test_the_share_of_the_pool_may_be_a_fraction_of_a_percent(tmp_path: Path) -> None:
    file = edited(tmp_path, "paid_share_percent = 10", 'paid_share_percent = "2.5"')
    assert load_catalogue(file).sponsorship.paid_share_percent == Decimal("2.5")


def test_the_environment_may_name_the_first_units_of_the_pool() -> None:
    settings = load_settings({"METERFALL_SPONSOR_INITIAL_UNITS": "77"})
    catalogue = load_catalogue(DEFAULT_CATALOGUE, sponsor_initial_units=settings.sponsor_initial_units)
    assert (catalogue.sponsorship.initial, load_catalogue(DEFAULT_CATALOGUE).sponsorship.initial) == (77, 10_000)
    assert catalogue.digest == load_catalogue(DEFAULT_CATALOGUE).digest


def test_a_catalogue_is_told_apart_by_the_digest_of_its_values(tmp_path: Path) -> None:
    file = edited(tmp_path, "paid_share_percent = 10", "paid_share_percent = 11")
    found = [load_catalogue(path) for path in (DEFAULT_CATALOGUE, file)]
    assert found[0].digest != found[1].digest
    assert all(each.fingerprint.startswith(each.digest) and len(each.digest) == 12 for each in found)
    assert found[1].text == file.read_text(encoding="utf-8")
    spaced = tmp_path / "spaced.toml"
    spaced.write_text("# a remark\n" + found[0].text.replace(" = ", "  =  "), encoding="utf-8")
    assert load_catalogue(spaced).fingerprint == found[0].fingerprint
    file.write_text(f'digest = "{found[0].digest}"\n' + file.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(CatalogueError, match="digest: Extra inputs"):
        load_catalogue(file)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    missing, broken, binary = tmp_path / "none.toml", tmp_path / "broken.toml", tmp_path / "binary.toml"
    broken.write_text("[plans.basic\nname = 1\n", encoding="utf-8")
    binary.write_bytes(DEFAULT_CATALOGUE.read_bytes() + b"# \xff\n")
    for path, said in ((missing, "No such file"), (tmp_path, "Is a directory"), (broken, "line 1"), (binary, "UTF-8")):
        with pytest.raises(CatalogueError) as caught:
            load_catalogue(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert said.lower() in str(caught.value).lower()

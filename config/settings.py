"""Settings: every limit of the system in one frozen object, read once from the environment.

`REDIS_URL` and `DATABASE_URL` keep their usual names; every other field is read from `METERFALL_<FIELD>`. So are these
two if `METERFALL_REDIS_URL` or `METERFALL_DATABASE_URL` is set: a platform sets the usual names for all its programs.
A secret may be in a file that `METERFALL_<FIELD>_FILE` names.
Names carry their unit. Producers need only the Redis part, so nothing here imports more than pydantic.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from schemas.events import KEY_ID_PATTERN

PREFIX = "METERFALL_"
# How alike two long names are, from 0 to 1, if one of them is a typo: one letter in ten differs.
_TYPO = 0.9
# Kubernetes sets `<SERVICE>_PORT` for each service: for one named meterfall-http that is the name of a setting.
_SERVICE_ADDRESSES = ("tcp://", "udp://", "sctp://")
# Those of a service named meterfall resemble our METERFALL_SERVE_HOST and METERFALL_SERVE_PORT, and are no typos.
_is_fact_of_service = re.compile(r"METERFALL_SERVICE_(HOST|PORT(_[A-Z0-9_]+)?)").fullmatch
UNPREFIXED = {"redis_url": "REDIS_URL", "database_url": "DATABASE_URL"}
# Errors never quote these: a URL may carry a password, a key is one. A file may hold each of them.
_SECRET_FIELDS = (*UNPREFIXED, "queue_redis_url", "migrate_url", "signing_keys", "console_secret")
_FILE = "_FILE"
DEFAULT_CATALOGUE = Path(__file__).with_name("catalogue.toml")

_REDIS_SCHEMES = ("redis", "rediss", "unix")
_POSTGRES_SCHEMES = ("postgresql", "postgres", "postgresql+psycopg")


def _url(schemes: tuple[str, ...]) -> AfterValidator:
    """Accept URLs of these schemes with a number as port."""

    def checked(value: str) -> str:
        try:
            parts = urlsplit(value)
            well_formed = parts.scheme in schemes and (parts.port is None or parts.port > 0)
        except ValueError:
            well_formed = False
        if not well_formed:
            raise ValueError(
                f"must be a URL {' or '.join(f'{scheme}://…' for scheme in schemes)} with a number as port"
            )
        return value

    return AfterValidator(checked)


class SigningKey(BaseModel):
    """A key that producers sign with. Its id travels with every event, its secret never."""

    model_config = ConfigDict(frozen=True)

    key_id: str
    secret: SecretStr
    ends_at: AwareDatetime | None = None


_KEY_FORM = "id=secret or id=secret@end, the secret 32 to 256 of A-Za-z0-9+/=._~-, the end a time with an offset"
_is_key_id = re.compile(KEY_ID_PATTERN).fullmatch
_is_secret = re.compile(r"[A-Za-z0-9+/=._~-]{32,256}").fullmatch


def _signing_keys(value: object) -> object:
    """Parse the keys of the setting. An error names a key by its number and quotes no secret."""
    if not isinstance(value, str):
        return value
    keys: list[SigningKey] = []
    for number, part in enumerate(value.replace(",", " ").split(), start=1):
        key_id, _, rest = part.partition("=")
        secret, at, end = rest.partition("@")
        try:
            if not (_is_key_id(key_id) and _is_secret(secret)):
                raise ValueError
            ends_at = TypeAdapter(AwareDatetime).validate_python(end) if at else None
        except ValueError:
            raise ValueError(f"key {number}: must be {_KEY_FORM}") from None
        if key_id in [key.key_id for key in keys]:
            raise ValueError(f"key {number}: another key has the same id")
        keys.append(SigningKey(key_id=key_id, secret=SecretStr(secret), ends_at=ends_at))
    return tuple(keys)


Count = Annotated[int, Field(ge=1)]
Units = Annotated[int, Field(ge=0, le=10**12)]
MAX_PARTITIONS = 1_024


class SettingsError(ValueError):
    """A setting is missing or out of range. The message names its variable and the values allowed."""


class Settings(BaseModel):
    """All settings, validated once. Defaults suit one small dyno."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    # Servers
    redis_url: Annotated[str, _url(_REDIS_SCHEMES)] = Field(
        "redis://127.0.0.1:6379/0",
        description="Redis or Valkey: streams, holds, cached balances, the queue",
        repr=False,
    )
    queue_redis_url: Annotated[str, _url(_REDIS_SCHEMES)] | None = Field(
        None,
        description="Redis or Valkey of the RQ queue alone, for dynos and `status`; unset: `REDIS_URL`",
        repr=False,
    )
    database_url: Annotated[str, _url(_POSTGRES_SCHEMES)] | None = Field(
        None, description="Postgres with the ledger; producers may leave it unset", repr=False
    )
    migrate_url: Annotated[str, _url(_POSTGRES_SCHEMES)] | None = Field(
        None,
        description="Postgres as the owner of the tables, for `migrate` alone; unset: `DATABASE_URL`",
        repr=False,
    )
    database_schema: Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_]{0,62}$")] | None = Field(
        None,
        description="schema of the tables, which `migrate` creates; unset: the first of the login's search path, "
        "usually `public`",
    )
    database_pooled: bool = Field(
        False,
        description="true: `DATABASE_URL` names a pooler of transactions, as PgBouncer; the roles then set the "
        "time-outs of Postgres",
    )
    redis_tls: str | None = Field(
        None,
        description="what a `rediss://` server proves itself with: a file of certificates, or `unverified` to believe "
        "any; unset: the certificates of the system",
    )
    redis_socket_timeout_ms: Annotated[int, Field(ge=100, le=60_000)] = Field(
        5_000, description="timeout of one Redis command"
    )
    redis_check_timeout_ms: Annotated[int, Field(ge=20, le=60_000)] = Field(
        500, description="timeout of a Redis command of checks and holds, which then go by `METERFALL_REDIS_DOWN`"
    )
    redis_down_pause_ms: Annotated[int, Field(ge=0, le=60_000)] = Field(
        1_000, description="how long checks and holds do without Redis after it failed, before one of them tries it"
    )
    client_connections: Count = Field(
        64, description="Redis connections that threads of a client use at a time; it keeps at most twice as many open"
    )
    client_wait_ms: Count = Field(2_000, description="how long a thread waits for one of them")
    redis_retries: Annotated[int, Field(ge=0, le=10)] = Field(
        2, description="retries after a timeout or a lost connection; every command is safe to repeat"
    )
    redis_wait_replicas: Annotated[int, Field(ge=0, le=10)] = Field(
        0, description="replicas that must have an event before its call is answered; with fewer it is not confirmed"
    )
    redis_wait_timeout_ms: Annotated[int, Field(ge=10, le=10_000)] = Field(
        200,
        validate_default=True,
        description="how long a call waits for these replicas; below the two timeouts of Redis commands",
    )
    allow_standby: bool = Field(
        False,
        description="true: clients read balances from a standby, which may be behind; a balance known as old fails",
    )
    database_pool_size: Count = Field(4, description="Postgres connections per process")
    database_connect_timeout_seconds: Annotated[int, Field(ge=2, le=60)] = Field(
        5, description="timeout of one attempt to connect to Postgres"
    )
    statement_timeout_ms: Count = Field(5_000, description="timeout of a statement in the money path")
    ledger_answer_grace_ms: Count = Field(
        1_000, description="silence past the statement timeout after which a process gives up its Postgres connection"
    )
    lock_timeout_ms: Count = Field(2_000, description="longest wait for an account lock")
    idle_in_transaction_timeout_ms: Count = Field(
        10_000, description="idle time after which Postgres frees the locks of a frozen worker"
    )
    migrate_patience_seconds: Count = Field(60, description="how long `migrate` retries to lock a table in use")

    # Billing
    catalogue_path: Path = Field(DEFAULT_CATALOGUE, description="plans and meters (TOML)")
    default_plan: str | None = Field(
        None, description="plan of an account that its first event opens; unset: such events are uncollected"
    )
    unknown_models: Literal["one", "refuse"] = Field(
        "one",
        description="a client meets a model without a multiplier: `one` counts it as 1 and warns, `refuse` refuses it",
    )
    renewal_grace_hours: Annotated[int, Field(ge=0, le=720)] = Field(
        24,
        description="how long a period stays open whose invoice is late, with the allowance of the one before; 0: the "
        "old period stays open instead",
    )
    late_events_grace_hours: Annotated[int, Field(ge=0, le=720)] = Field(
        24, description="how long a period stays unclosed for events of its partition that wait in the stream"
    )
    billing_enabled: bool = Field(True, description="false: every check is allowed, workers still record events")
    redis_down: Literal["deny", "ledger", "allow"] = Field(
        "ledger", description="how a check answers while Redis is down: `deny`, `ledger` or `allow`"
    )
    redis_down_max_amount: Annotated[int, Field(ge=0, le=10**12)] = Field(
        10_000, description="`allow`: units that one process grants per account and meter while Redis is down"
    )
    redis_down_max_holds: Count = Field(
        1_000, description="`ledger`: open holds per account while Redis is down, beside what the balance allows"
    )

    # Events
    partitions: Annotated[int, Field(ge=1, le=MAX_PARTITIONS)] = Field(
        8, description="number of streams; once data exists, `repartition` changes it"
    )
    event_max_age_days: Annotated[int, Field(ge=1, le=3_650)] = Field(
        35, description="workers and clients refuse older events"
    )
    event_max_ahead_seconds: Annotated[int, Field(ge=0, le=86_400)] = Field(
        300, description="workers clamp events dated further ahead"
    )
    emit_chunk_events: Annotated[int, Field(ge=1, le=1_000)] = Field(
        200, description="events per call of the emit script"
    )
    signing_keys: Annotated[tuple[SigningKey, ...], BeforeValidator(_signing_keys)] = Field(
        (),
        description="`id=secret` or `id=secret@end`, separated by commas, each secret of 32 to 256 characters; "
        "the first signs, all verify",
    )
    signatures: Literal["off", "optional", "required"] = Field(
        "off", description="what workers verify; `optional`: a signature may be missing, but not wrong"
    )
    spool_path: Path | None = Field(
        None,
        description="folder that spools events which Redis does not confirm; unset: the call raises them",
    )
    spool_max_bytes: Annotated[int, Field(ge=65_536)] = Field(
        64 * 2**20, description="size limit of the spool; beyond it the call raises events again"
    )

    # Holds and cached balances
    hold_ttl_seconds: Annotated[int, Field(ge=1, le=604_800)] = Field(
        600, description="life of a hold, unless `reserve` names another"
    )
    outcome_ttl_seconds: Annotated[int, Field(ge=1, le=86_400)] = Field(
        900, description="how long Redis remembers an outcome for repeated calls"
    )
    cache_ttl_ms: Annotated[int, Field(ge=100, le=60_000)] = Field(60_000, description="life of a cached balance")
    ledger_down_balance_max_age_seconds: Annotated[int, Field(ge=0, le=86_400)] = Field(
        900, description="age up to which the last known balance answers while Postgres does not; 0: none does"
    )
    ledger_down_pause_ms: Annotated[int, Field(ge=1, le=60_000)] = Field(
        1_000, description="how long those answers do not wait for Postgres after it failed; then one call tries it"
    )
    version_ttl_seconds: Annotated[int, Field(ge=60, le=604_800)] = Field(
        3_600,
        description="how long Redis remembers the version of a balance; an older one, from a standby, is not cached",
    )
    load_lease_ttl_ms: Count = Field(5_000, description="time limit for loading one balance from Postgres")

    load_wait_ms: Count = Field(
        5_000, description="how long a call waits while others of its process load balances from Postgres"
    )

    load_other_wait_ms: Annotated[int, Field(ge=0, le=60_000)] = Field(
        1_000, description="how long a call waits while another process loads the same balance from Postgres"
    )

    # Sponsorship
    sponsor_initial_units: Units | None = Field(
        None, description="units that the pool opens with; overrides the catalogue until the pool is open"
    )
    sponsor_daily_units_new: Units | None = Field(
        None, description="units the pool covers per day for trust tier `new`; overrides the catalogue"
    )
    sponsor_daily_units_established: Units | None = Field(None, description="the same for `established`")
    sponsor_daily_units_trusted: Units | None = Field(None, description="the same for `trusted`")
    sponsor_daily_units_elite: Units | None = Field(None, description="the same for `elite`")

    # Draining
    batch_max_events: Annotated[int, Field(ge=1, le=20_000)] = Field(5_000, description="events per transaction")
    batch_max_bytes: Annotated[int, Field(ge=65_536)] = Field(8 * 2**20, description="payload bytes per transaction")
    read_chunk_events: Annotated[int, Field(ge=1, le=5_000)] = Field(500, description="stream entries per Redis read")
    publish_chunk_accounts: Annotated[int, Field(ge=1, le=1_000)] = Field(
        100, description="accounts per call of the publish script"
    )
    drain_time_box_ms: Count = Field(2_000, description="a drain job re-enqueues itself after this")
    poison_deaths: Count = Field(3, description="worker deaths on one event alone that make it a dead letter")
    hand_grace_ms: Count = Field(
        2_500, description="age up to which the mark on a batch is a living worker's; keep it above any lock wait"
    )
    halt_seconds: Count = Field(2, description="how long a partition halts after an error that no event caused")

    catalogue_wait_minutes: Annotated[int, Field(ge=0, le=1_440)] = Field(
        60, description="how long an event waits for a catalogue that has its meter, once a process carries such a one"
    )
    catalogue_wait_max_entries: Annotated[int, Field(ge=0)] = Field(
        10_000, description="stream entries of a partition beyond which no event waits for a catalogue"
    )

    pause_min_entries: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        500, description="latest stream entries of a partition that decide about a pause; 0: never pause"
    )
    pause_percent: Annotated[int, Field(ge=1, le=100)] = Field(
        50, description="percentage of unreadable or badly signed stream entries that pauses a partition"
    )

    # Workers
    queue_name: Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,32}$")] = Field(
        "meterfall",
        description="name of the RQ queue; the proof has its own, `…-proof`, and so have notices, `…-notices`",
    )
    job_timeout_seconds: Annotated[int, Field(ge=10)] = Field(30, description="RQ kills a job after this")
    sweep_interval_ms: Count = Field(1_000, description="interval of the sweep for backlogs and periodic jobs")
    stop_timeout_seconds: Count = Field(
        25, description="time from SIGTERM until the supervisor kills its worker process"
    )
    renew_interval_seconds: Annotated[int, Field(ge=0)] = Field(
        60, description="interval of the job that stores due periods; 0: only events and account commands store them"
    )
    renew_chunk_accounts: Annotated[int, Field(ge=1, le=10_000)] = Field(
        1_000, description="accounts per transaction of that job"
    )
    verify_interval_seconds: Annotated[int, Field(ge=0)] = Field(
        3_600, description="interval of the periodic `verify`; 0: never"
    )
    verify_chunk_accounts: Count = Field(500, description="accounts per snapshot of `verify`")
    verify_chunk_changes: Count = Field(2_000, description="changes per snapshot of `verify`")
    verify_time_box_seconds: Annotated[int, Field(ge=1, le=3_600)] = Field(
        5, description="a job of the periodic `verify` re-enqueues itself after this; keep it below the stop timeout"
    )
    verify_load_percent: Annotated[int, Field(ge=1, le=100)] = Field(
        25, description="percentage of its time that the periodic `verify` works; it rests between two snapshots"
    )
    verify_timeout_ms: Count = Field(60_000, description="statement timeout of `verify`")
    pending_alarm_seconds: Count = Field(60, description="`verify` reports an applied event that stays pending longer")

    # Notices
    webhook_interval_seconds: Annotated[int, Field(ge=0, le=3_600)] = Field(
        2,
        description="interval of the look for notices that are due; 0: none are sent, but old ones are deleted",
    )
    webhook_time_box_seconds: Annotated[int, Field(ge=1, le=3_600)] = Field(
        5, description="a job that sends notices re-enqueues itself after this; keep it below the stop timeout"
    )
    webhook_timeout_ms: Annotated[int, Field(ge=100, le=60_000)] = Field(
        10_000, description="time for one delivery, from the resolution of its host to the head of the answer"
    )
    webhook_max_under_way: Annotated[int, Field(ge=1, le=1_000)] = Field(
        64, description="deliveries under way at once in a process"
    )
    webhook_max_under_way_each: Annotated[int, Field(ge=1, le=1_000)] = Field(
        32, description="of them to one webhook; to one that failed last, 1"
    )
    webhook_retry_seconds: Annotated[float, Field(gt=0, le=86_400)] = Field(
        5, description="wait after the first failure of a delivery; four times as long after each, at most a day"
    )
    webhook_max_attempts: Annotated[int, Field(ge=1, le=100)] = Field(
        10, description="failures of a delivery after which it is given up, until `notices replay`"
    )
    webhook_private_addresses: bool = Field(
        False, description="true: webhooks may lead to private and loopback addresses, to these also by http"
    )
    notice_keep_days: Annotated[int, Field(ge=1, le=3_650)] = Field(
        30, description="how long notices are kept, delivered or not"
    )

    # Reports
    health_max_lag_seconds: Count = Field(
        60, description="age of the oldest waiting event from which `status` and `health` call the system degraded"
    )
    rollup_after_rows: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        250, description="changes of one account after which workers update its roll-ups"
    )

    confirm_amount_units: Units = Field(
        1_000_000, description="units above which a command that moves them shows before and after, and asks"
    )
    confirm_items: Annotated[int, Field(ge=0, le=10**9)] = Field(
        10, description="dead letters, accounts or other things above which a command that changes them asks"
    )

    pager: str | None = Field(
        None, description="program that shows long lists on a terminal; unset: `PAGER`, else `less`; `cat`: none"
    )

    sum_up_interval_seconds: Annotated[int, Field(ge=0)] = Field(
        60, description="interval of the job that sums up usage for the reports over all accounts; 0: never"
    )
    report_timeout_ms: Count = Field(60_000, description="statement timeout of the reports over all accounts")
    near_limit_percent: Annotated[int, Field(ge=1, le=100)] = Field(
        80, description="percentage of a limit from which `report near-limit` lists an account"
    )

    # The HTTP service
    api_key_trusted_ms: Annotated[int, Field(ge=0, le=60_000)] = Field(
        5_000, description="how long a process goes by the API keys that it read; a revoked key ends within this time"
    )
    api_key_unknown_pause_ms: Annotated[int, Field(ge=0, le=60_000)] = Field(
        250, description="how long a process goes by them for a key that is not among them; a new key counts after this"
    )
    api_key_outage_seconds: Annotated[int, Field(ge=0, le=86_400)] = Field(
        900, description="how long it goes by them while Postgres does not answer; 0: not at all"
    )

    serve_port: Annotated[int, Field(ge=1, le=65_535)] = Field(8_080, description="port of `meterfall serve`")
    serve_host: str = Field(
        "127.0.0.1", description="address that it listens on; a proxy that ends TLS reaches it there"
    )
    serve_processes: Annotated[int, Field(ge=1, le=64)] = Field(1, description="processes that share this port")
    serve_body_max_bytes: Annotated[int, Field(ge=1_024, le=2**28)] = Field(
        4 * 2**20, description="size limit of the body of a request"
    )
    serve_batch_max_events: Annotated[int, Field(ge=1, le=10_000)] = Field(
        1_000, description="events in the body of one request"
    )
    serve_timeout_seconds: Annotated[int, Field(ge=1, le=300)] = Field(
        30, description="time for one request, from its head to its answer"
    )
    serve_stop_timeout_seconds: Annotated[int, Field(ge=1, le=300)] = Field(
        20, description="time from SIGTERM for requests under way; later ones are cut off"
    )
    serve_account_threads: Annotated[int, Field(ge=2, le=64)] = Field(
        4, description="changes and reports of accounts that a process does at once; one is kept for changes"
    )
    serve_waiting_max_calls: Annotated[int, Field(ge=1, le=10_000)] = Field(
        64, description="such calls that wait or run; more are answered 429"
    )

    console_secret: SecretStr | None = Field(
        None,
        description="what signs the sessions of the console: 32 to 256 characters; unset: a new one at each start",
    )
    console_session_minutes: Annotated[int, Field(ge=1, le=1_440)] = Field(
        240, description="time from signing in to the console until the session is over"
    )

    http_port: Annotated[int, Field(ge=1, le=65_535)] | None = Field(
        None, description="port of a dyno's `/live`, `/ready` and `/metrics`; unset: none"
    )
    http_host: str = Field("127.0.0.1", description="address that this port listens on")
    log_level: Literal["TRACE", "DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="lowest severity logged, on stderr"
    )
    log_format: Literal["text", "json"] = Field("text", description="form of a line of the log")
    log_user_ids: Literal["hashed", "plain"] = Field(
        "hashed", description="how logs name users; `account show` prints the hash"
    )

    @property
    def queue_url(self) -> str:
        """The Redis of the RQ queue."""
        return self.queue_redis_url or self.redis_url

    @field_validator("redis_wait_timeout_ms")
    @classmethod
    def _is_within_commands(cls, value: int, info: ValidationInfo) -> int:
        if info.data.get("redis_wait_replicas"):
            for field in ("redis_check_timeout_ms", "redis_socket_timeout_ms"):
                if value >= info.data.get(field, value + 1):
                    raise ValueError(f"must be less than {variable_name(field)}, which is {info.data[field]}")
        return value

    @field_validator("redis_tls")
    @classmethod
    def _is_for_tls(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            return None
        if not str(info.data.get("redis_url", "")).startswith("rediss://"):
            raise ValueError("REDIS_URL must be rediss://…; without TLS there is nothing to prove")
        if value != "unverified" and not Path(value).is_file():
            raise ValueError("must be a file of certificates (PEM), or unverified")
        return value

    @field_validator("console_secret")
    @classmethod
    def _is_long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not _is_secret(value.get_secret_value()):
            raise ValueError("must be 32 to 256 characters of A-Za-z0-9+/=._~-")
        return value

    @field_validator("signatures")
    @classmethod
    def _has_keys(cls, value: str, info: ValidationInfo) -> str:
        if value != "off" and info.data.get("signing_keys") == ():
            raise ValueError(f"{variable_name('signing_keys')} is unset, and without a key nothing can be checked")
        return value


def variable_name(field: str) -> str:
    """Return the name of the environment variable that sets `field`."""
    return UNPREFIXED.get(field, PREFIX + field.upper())


def _letters_alike(one: str, other: str) -> int:
    """Count the letters with which both begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(one), len(other)))


def _is_slip(name: str, meant: str) -> bool:
    """True if one letter is wrong, missing or too many, or if two neighbours have changed places."""
    head = _letters_alike(name, meant)
    rests = name[head:], meant[head:]
    tail = _letters_alike(rests[0][::-1], rests[1][::-1])
    left, right = (rest[: len(rest) - tail] for rest in rests)
    return max(len(left), len(right)) <= 1 or (len(left) == 2 and left == right[::-1])


def _is_address_of_service(name: str, value: str) -> bool:
    return name.endswith("_PORT") and value.startswith(_SERVICE_ADDRESSES)


def _meant_by(name: str, known: Iterable[str]) -> str | None:
    """Return the one of the `known` variables that `name` is probably a typo of; None if it resembles none."""
    if _is_fact_of_service(name):
        return None
    meant = [each for each in known if each.startswith(PREFIX)]
    slips = [each for each in meant if _is_slip(name, each)]
    # Without the prefix, which would make short names alike.
    bare = {each.removeprefix(PREFIX): each for each in meant}
    close = get_close_matches(name.removeprefix(PREFIX), bare, n=1, cutoff=_TYPO)
    found = [*slips, *(bare[each] for each in close)]
    return found[0] if found else None


def load_settings(environ: Mapping[str, str], **overrides: object) -> Settings:
    """Read the settings from `environ`; `overrides` win (tests and the command line use them).

    An empty variable counts as unset. `METERFALL_REDIS_URL` and `METERFALL_DATABASE_URL` win over the names without
    the prefix. A secret that `METERFALL_…_FILE` names is read now, without the space around it.
    Raises SettingsError in one line that names the variable and the values allowed. A `METERFALL_…` variable that is
    almost a setting raises it also: a typo must not silently leave a default in force. Others only warn: Kubernetes
    sets METERFALL_PORT for a service of that name, and METERFALL_HTTP_PORT for one named meterfall-http; after a
    roll-back the settings of the newer release are there.
    """
    known = {variable_name(field): field for field in Settings.model_fields}
    own = {PREFIX + name: field for field, name in UNPREFIXED.items()}
    files = {PREFIX + field.upper() + _FILE: field for field in _SECRET_FIELDS}
    ours = known | own | files
    foreign = sorted(
        name
        for name, value in environ.items()
        if name.startswith(PREFIX) and (name not in ours or _is_address_of_service(name, value))
    )
    for name in foreign:
        if name not in ours and (meant := _meant_by(name, ours)) is not None:
            raise SettingsError(f"{name}: no such setting, is it {meant}? README.md lists them")
    if foreign:
        logging.getLogger("meterfall").warning("no settings of this release, ignored: %s", ", ".join(foreign))
    # Later names win.
    values: dict[str, object] = {
        field: environ[name]
        for name, field in (*known.items(), *own.items())
        if environ.get(name) and name not in foreign
    }
    values |= {field: _read_secret(environ, name) for name, field in files.items() if environ.get(name)}
    try:
        return Settings.model_validate(values | overrides)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = str(first["loc"][0])
        reason = first["msg"].removeprefix("Value error, ")
        got = "" if field in _SECRET_FIELDS else f" (got {first['input']!r})"
        raise SettingsError(f"{variable_name(field)}: {reason}{got}") from None


def _read_secret(environ: Mapping[str, str], name: str) -> str:
    """Return the content of the file that the variable `name` names. Raises SettingsError, which quotes none of it."""
    if environ.get(value_name := name.removesuffix(_FILE)):
        raise SettingsError(f"{name}: {value_name} is set also; set one of them")
    try:
        content = Path(environ[name]).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise SettingsError(f"{name}: {environ[name]}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{name}: {environ[name]}: must be UTF-8") from None
    if not content:
        raise SettingsError(f"{name}: {environ[name]} is empty")
    return content


def naming_servers(environ: Mapping[str, str], database_url: str, redis_url: str) -> dict[str, str]:
    """Return `environ` for a child process that uses these two servers alone, however the environment names others."""
    prefixed = {PREFIX + name for name in (*UNPREFIXED.values(), "QUEUE_REDIS_URL")}
    unwanted = prefixed | {name + _FILE for name in prefixed}
    kept = {name: value for name, value in environ.items() if name not in unwanted}
    return kept | {UNPREFIXED["database_url"]: database_url, UNPREFIXED["redis_url"]: redis_url}


def without_secrets(url: str) -> str:
    """Return a server's URL without its passwords, for logs and messages."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    user = parts.username
    query = [(name, "***" if "password" in name.lower() else value) for name, value in parse_qsl(parts.query)]
    return urlunsplit(parts._replace(netloc=f"{user}@{host}" if user else host, query=urlencode(query, safe="/*:")))

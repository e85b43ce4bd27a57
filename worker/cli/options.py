"""The arguments and options that commands share, each with one wording."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from schemas.codes import Refusal

# Accounts and usage
User = Annotated[str, typer.Argument(help="user id")]
MeterArgument = Annotated[str, typer.Argument(help="meter, as in the catalogue")]
MeterOption = Annotated[str, typer.Option(help="meter, as in the catalogue")]
RelayMeterOption = Annotated[str, typer.Option("--meter", help="meter, as in the catalogue")]
AmountArgument = Annotated[int, typer.Argument(help="units, after the multiplier")]
UnitsArgument = Annotated[
    int, typer.Argument(help="units, after the multiplier; with --model or --multiplier, before it")
]
ModelOption = Annotated[str | None, typer.Option(help="model that does the work; its multiplier counts")]
MultiplierOption = Annotated[str | None, typer.Option(help="decimal, instead of a model's; 1: already multiplied")]
HoldKeyArgument = Annotated[str, typer.Argument(help="key of the hold")]
TtlOption = Annotated[int | None, typer.Option(help="life of the hold, in seconds")]
EventArgument = Annotated[str, typer.Argument(help="id of the event")]
EventOption = Annotated[str | None, typer.Option("--event-id", help="id of the event")]
SourceOption = Annotated[str | None, typer.Option(help="the service that did the work")]
DimensionOption = Annotated[list[str] | None, typer.Option("--dimension", "-d", help="name=value, repeatable")]
BackendOption = Annotated[str | None, typer.Option(help="backend that does the work; its sub-cap counts also")]
TierOption = Annotated[str | None, typer.Option(help="plan that the request carries; the account changes to it first")]

# Changes of an account
PlanArgument = Annotated[str, typer.Argument(help="plan code; see `meterfall plans`")]
PlanOption = Annotated[str | None, typer.Option(help="plan on which a new account is opened")]
AtOption = Annotated[
    str, typer.Option(metavar="now|period_end|TIME", help="when it takes effect; a time is ISO 8601 with offset")
]
ActorOption = Annotated[
    str | None, typer.Option("--by", help="author of the change; default your login", show_default=False)
]
CauseOption = Annotated[str | None, typer.Option("--reason", help="reason for the change; the timeline shows it")]
KeyOption = Annotated[str, typer.Option(help="its purpose, such as the order id; a repeat changes nothing")]

# The sponsorship pool
SponsoredUser = Annotated[str, typer.Argument(help="user id; '' for a request without a user")]
EstimateArgument = Annotated[int, typer.Argument(help="units that the whole request is expected to cost")]
RequestArgument = Annotated[str, typer.Argument(help="id of the request; a repeat is harmless")]
PaidArgument = Annotated[int, typer.Argument(help="units paid by the user")]

# Operating
PartitionArgument = Annotated[str, typer.Argument(help="number of the partition, or sponsor for the pool's stream")]
LettersArgument = Annotated[list[int] | None, typer.Argument(help="ids", show_default=False)]
WhyOption = Annotated[
    str | None, typer.Option("--why", help="why, for the next operator; `dead list` and `dead show` tell it")
]
LetterStateOption = Annotated[
    Literal["open", "replayed", "dropped"], typer.Option("--state", help="only letters in this state")
]
LetterReasonOption = Annotated[Refusal | None, typer.Option("--reason", help="only letters of this reason")]
LetterPartitionOption = Annotated[int | None, typer.Option("--partition", help="only letters of this partition")]
LetterUserOption = Annotated[str | None, typer.Option("--user", help="only letters whose payload names this user")]
LetterSourceOption = Annotated[
    str | None, typer.Option("--source", help="only letters whose payload names this service")
]
SinceOption = Annotated[str | None, typer.Option("--since", help="only letters since then, ISO 8601 with offset")]
AllOfReasonOption = Annotated[Refusal | None, typer.Option("--reason", help="all open letters of this reason")]
ReasonOption = Annotated[str, typer.Option(help="reason, for the next operator")]
YesOption = Annotated[bool, typer.Option("--yes", help="do not ask")]

# Output
LimitOption = Annotated[int, typer.Option(min=1, max=100_000)]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON")]

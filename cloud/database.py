"""What the controller remembers: SQLAlchemy models, on SQLite in the data directory or on PostgreSQL.

The database is the truth; brokers and devices are brought back to it. Times are Unix seconds.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Engine,
    ForeignKey,
    LargeBinary,
    String,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    make_url,
)
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from skills.errors import StorageError

SCHEMA = 1


class Base(DeclarativeBase):
    """All tables."""


class Device(Base):
    """An enrolled device, what it can do (`hello`) and what it last reported (`state`), both as the bytes it sent."""

    __tablename__ = "devices"
    id: Mapped[str] = mapped_column(String(63), primary_key=True)
    labels: Mapped[dict[str, str]] = mapped_column(JSON, default=dict)
    key_sha256: Mapped[str] = mapped_column(String(64))
    cert_serial: Mapped[str] = mapped_column(String(64))
    enrolled: Mapped[float]
    counter: Mapped[int] = mapped_column(BigInteger, default=0)
    nonce: Mapped[str] = mapped_column(String(64), default="")
    hello: Mapped[bytes | None] = mapped_column(LargeBinary)
    state: Mapped[bytes | None] = mapped_column(LargeBinary)
    seen: Mapped[float | None]
    online: Mapped[bool] = mapped_column(default=False)


class Invite(Base):
    """An invitation; only the digest of its secret is kept."""

    __tablename__ = "invites"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    labels: Mapped[dict[str, str]] = mapped_column(JSON, default=dict)
    expires: Mapped[float]
    used_by: Mapped[str | None] = mapped_column(String(63))


class Revocation(Base):
    """A certificate that is no longer accepted."""

    __tablename__ = "revocations"
    serial: Mapped[str] = mapped_column(String(64), primary_key=True)
    device: Mapped[str] = mapped_column(String(63))
    time: Mapped[float]


class Release(Base):
    """A bundle that the signed repository lists."""

    __tablename__ = "releases"
    __table_args__ = (UniqueConstraint("skill", "version"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    skill: Mapped[str] = mapped_column(String(63))
    version: Mapped[str] = mapped_column(String(32))
    manifest_sha256: Mapped[str] = mapped_column(String(64))
    manifest_size: Mapped[int]
    target: Mapped[str] = mapped_column(String(200))
    time: Mapped[float]


class RolloutRow(Base):
    """A rollout; its decisions are made in `cloud.rollout`."""

    __tablename__ = "rollouts"
    id: Mapped[int] = mapped_column(primary_key=True)
    skill: Mapped[str] = mapped_column(String(63), index=True)
    version: Mapped[str | None] = mapped_column(String(32))  # None: each device its own (a rollback)
    kind: Mapped[str] = mapped_column(String(16))
    selector: Mapped[str] = mapped_column(Text)
    canary: Mapped[int]
    state: Mapped[str] = mapped_column(String(16), index=True)
    proven: Mapped[bool]
    reason: Mapped[str] = mapped_column(Text, default="")
    time: Mapped[float]


class MemberRow(Base):
    """One device in a rollout."""

    __tablename__ = "rollout_members"
    rollout: Mapped[int] = mapped_column(ForeignKey("rollouts.id", ondelete="CASCADE"), primary_key=True)
    device: Mapped[str] = mapped_column(String(63), primary_key=True, index=True)
    position: Mapped[int]
    version: Mapped[str] = mapped_column(String(32))
    previous: Mapped[str | None] = mapped_column(String(32))
    canary: Mapped[bool]
    stage: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str] = mapped_column(Text, default="")
    returned: Mapped[bool] = mapped_column(default=False)


class Wanted(Base):
    """Which version of a skill a device should run."""

    __tablename__ = "wanted"
    device: Mapped[str] = mapped_column(String(63), primary_key=True)
    skill: Mapped[str] = mapped_column(String(63), primary_key=True)
    version: Mapped[str] = mapped_column(String(32))


class Served(Base):
    """Which versions of a skill a device served, oldest first: what a rollback goes back through."""

    __tablename__ = "served"
    device: Mapped[str] = mapped_column(String(63), primary_key=True)
    skill: Mapped[str] = mapped_column(String(63), primary_key=True)
    versions: Mapped[list[str]] = mapped_column(JSON)


class Event(Base):
    """The audit: who did what to which device, and what it answered."""

    __tablename__ = "events"
    id: Mapped[int] = mapped_column(primary_key=True)
    time: Mapped[float] = mapped_column(index=True)
    kind: Mapped[str] = mapped_column(String(63))
    device: Mapped[str | None] = mapped_column(String(63), index=True)
    data: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)


class Fact(Base):
    """Single values, such as the schema's version."""

    __tablename__ = "facts"
    key: Mapped[str] = mapped_column(String(63), primary_key=True)
    value: Mapped[str] = mapped_column(Text)


class Database:
    """Opens sessions; each `with db.begin()` block is one transaction that is kept whole or not at all."""

    def __init__(self, url: str) -> None:
        """Open the database and make its tables where they are missing.

        Raises:
            StorageError: it cannot be opened, or was written by a newer version.
        """
        with _database_errors():
            self._engine = _engine(url)
        try:
            with _database_errors():
                Base.metadata.create_all(self._engine)
            self._check_schema()
        except BaseException:
            self.close()
            raise

    def _check_schema(self) -> None:
        with self.begin() as session:
            known = session.get(Fact, "schema")
            if known is None:
                session.add(Fact(key="schema", value=str(SCHEMA)))
            elif int(known.value) > SCHEMA:
                raise StorageError(
                    f"the database has the schema {known.value}, this version knows {SCHEMA}: install the newer version again"
                )

    @contextlib.contextmanager
    def begin(self) -> Iterator[Session]:
        """Open a transaction; it is committed at the end of the block and undone by any error.

        Raises:
            StorageError: the disk is full or refuses; nothing of the block was kept.
        """
        with _database_errors(), Session(self._engine, expire_on_commit=False) as session, session.begin():
            yield session

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()


def _engine(url: str) -> Engine:
    if make_url(url).get_backend_name() != "sqlite":
        return create_engine(url, pool_pre_ping=True)
    engine = create_engine(url, connect_args={"timeout": 5})

    @event.listens_for(engine, "connect")
    def _prepare(connection: Any, _record: object) -> None:
        # FULL: a counter or a rollout's step that was acted upon must not be forgotten by a power cut.
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "journal_size_limit=16777216"):
            connection.execute(f"PRAGMA {pragma}")

    return engine


@contextlib.contextmanager
def _database_errors() -> Iterator[None]:
    try:
        yield
    except OperationalError as error:
        cause = str(error.orig)
        if "full" in cause:
            raise StorageError("no space left to write the controller's database: free some, then try again") from error
        raise StorageError(f"the controller's database does not answer: {cause}") from error
    except DBAPIError as error:
        raise StorageError(f"the controller's database refused: {error.orig}") from error
    except (SQLAlchemyError, ImportError) as error:
        raise StorageError(f"the controller's database cannot be used: {error}") from error

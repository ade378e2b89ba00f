"""The `infexport` command."""

from infexport.cli import cli


def main() -> None:
    cli(prog_name="infexport")


if __name__ == "__main__":
    main()

"""The data half against what it stands on: DuckDB, img2dataset, bare encoders, pure decoding."""

from __future__ import annotations

from bench import data_download, data_loader, data_metadata, data_score, data_select

PARTS = {
    "metadata": data_metadata,
    "download": data_download,
    "score": data_score,
    "select": data_select,
    "loader": data_loader,
}


def main() -> None:
    """The data half against what it stands on: DuckDB, img2dataset, encoders, decoding."""
    for name, part in PARTS.items():
        print(f"-- {name}: {(part.__doc__ or '').splitlines()[0]}", flush=True)
        part.main()


if __name__ == "__main__":
    main()

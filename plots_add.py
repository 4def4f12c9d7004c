

def plot_lengths(picture: pathlib.Path, rows: Sequence[Any], title: str) -> None:
    """One panel per metric over sequence length, ours beside the peer; rows named "<model>, <length> tokens"."""
    metrics = list(dict.fromkeys(row.metric for row in rows))
    figure = Figure(figsize=(5 * len(metrics), 4), dpi=120, layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        chosen = [row for row in rows if row.metric == metric]
        lengths = [int(row.name.split(", ")[1].split()[0].replace(",", "")) for row in chosen]
        axes.loglog(lengths, [row.ours for row in chosen], "o-", label="Samba")
        axes.loglog(lengths, [row.peer for row in chosen], "s--", label="transformer twin")
        axes.set(xlabel="tokens", title=metric)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(picture)

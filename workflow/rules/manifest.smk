def dataset_root(wildcards):
    """Where a data set lies; the demo's scenes are made among the results."""
    dataset = CONFIG.datasets[wildcards.dataset]
    if dataset.reader == "demo":
        return f"{RESULTS}/{wildcards.dataset}/scenes/scenes.csv"
    return dataset.root


def dataset_source(wildcards):
    """The demo's scenes as an input; other data sets are watched through their content."""
    demo = CONFIG.datasets[wildcards.dataset].reader == "demo"
    return dataset_root(wildcards) if demo else []


@one_line
def dataset_content(wildcards):
    """What changes when images come, go or change; scenes have a rule that says so."""
    dataset = CONFIG.datasets[wildcards.dataset]
    if dataset.reader == "demo":
        return "scenes"
    names = load_classes(Path(dataset.classes)).names
    return fingerprint(
        read_dataset(dataset.reader, Path(dataset.root), dataset.splits, names)
    )


@one_line
def class_names(wildcards):
    """The class names without their aliases, which only the text encoder reads."""
    return list(load_classes(Path(CONFIG.datasets[wildcards.dataset].classes)).names)


def scenes_key(key):
    """A value of the demo's scenes."""
    return lambda wildcards: getattr(CONFIG.datasets[wildcards.dataset].scenes, key)


rule scenes:
    output:
        f"{DATASET}/scenes/scenes.csv",
    log:
        f"{LOGS}/scenes/{{dataset}}.log",
    params:
        seed=scenes_key("seed"),
        train=scenes_key("train"),
        test=scenes_key("test"),
        size=scenes_key("size"),
        code=source_digest("cdul_steps.demo.scenes"),
    threads: 8
    shell:
        "cdul demo scenes --output $(dirname {output:q}) --seed {params.seed} "
        "--train {params.train} --test {params.test} --size {params.size} 2> {log:q}"


checkpoint manifest:
    input:
        dataset_source,
    output:
        # Kept for the next run, which gives known images their rows again.
        update(IMAGES),
    log:
        f"{LOGS}/manifest/{{dataset}}.log",
    params:
        reader=lambda wildcards: {"demo": "table"}.get(
            CONFIG.datasets[wildcards.dataset].reader,
            CONFIG.datasets[wildcards.dataset].reader,
        ),
        root=dataset_root,
        classes=dataset_key("classes"),
        splits=lambda wildcards: [
            f"--split={ours}={theirs}"
            for ours, theirs in CONFIG.datasets[wildcards.dataset].splits.items()
        ],
        grid=dataset_key("grid"),
        shard_size=dataset_key("shard_size"),
        max_pixels=dataset_key("max_pixels"),
        names=class_names,
        content=dataset_content,
        code=code("manifest"),
    shell:
        "cdul manifest --reader {params.reader} --root {params.root:q} "
        "--classes {params.classes:q} {params.splits:q} --grid {params.grid} "
        "--shard-size {params.shard_size} --max-pixels {params.max_pixels} "
        "--output {output:q} 2> {log:q}"

rule scenes:
    output:
        below(results.SCENES),
    log:
        f"{LOGS}/scenes/{{dataset}}.log",
    benchmark:
        f"{BENCHMARKS}/scenes/{{dataset}}.tsv"
    threads: 8
    params:
        seed=scenes_key("seed"),
        train=scenes_key("train"),
        test=scenes_key("test"),
        size=scenes_key("size"),
        code=source_digest("cdul_steps.demo.scenes", "write_scenes"),
    shell:
        'cdul demo scenes --output "$(dirname {output:q})" --seed {params.seed} '
        "--train {params.train} --test {params.test} --size {params.size} 2> {log:q}"


checkpoint manifest:
    input:
        dataset_source,
    output:
        # Kept for the next run, in which known images keep their rows.
        images=update(IMAGES),
        # Next to it; declared only if Snakemake must transfer them to a storage.
        shards=[update(directory(folder)) for folder in stored_folders()],
    log:
        f"{LOGS}/manifest/{{dataset}}.log",
    benchmark:
        f"{BENCHMARKS}/manifest/{{dataset}}.tsv"
    wildcard_constraints:
        dataset=one_of(CONFIG.datasets),
    params:
        reader=manifest_reader,
        root=dataset_root,
        classes=dataset_key("classes"),
        splits=lambda wildcards: [
            f"--split={ours}={theirs}"
            for ours, theirs in CONFIG.datasets[wildcards.dataset].splits.items()
        ],
        grid=grid_options,
        overlap=dataset_key("overlap"),
        shard_size=dataset_key("shard_size"),
        max_pixels=dataset_key("max_pixels"),
        labelled_only=flag("labelled-only", dataset_key("labelled_only")),
        exclude=lambda wildcards: [
            f"--exclude={pattern}"
            for pattern in CONFIG.datasets[wildcards.dataset].exclude
        ],
        max_failed_share=dataset_key("max_failed_share"),
        names=class_names,
        content=dataset_content,
        code=code("manifest", "make_manifest"),
    shell:
        'mkdir -p "$(dirname {output.images:q})" {output.shards:q}; '
        "cdul manifest --reader {params.reader} --root {params.root:q} "
        "--classes {params.classes:q} {params.splits:q} {params.grid} "
        "--overlap {params.overlap} --shard-size {params.shard_size} --max-pixels {params.max_pixels} "
        "{params.labelled_only} {params.exclude:q} --max-failed-share {params.max_failed_share} "
        "--output {output.images:q} 2> {log:q}"

rule train:
    input:
        labels=PSEUDO_LABELS,
        images=IMAGES,
        features=training_features(f"{FEATURES}/zarr.json"),
        feature_shards=training_features(f"{FEATURES}/c/{{shard}}/0/0"),
        feature_tables=training_features(FEATURE_TABLE),
        start=first_classifier,
    output:
        weights=WEIGHTS,
        card=CARD,
        history=HISTORY,
        refined=REFINED,
    log:
        f"{LOGS}/train/{{dataset}}/{{encoder}}/{{labels}}/{{training}}.log",
    benchmark:
        f"{BENCHMARKS}/train/{{dataset}}/{{encoder}}/{{labels}}/{{training}}.tsv"
    threads: 8 * RUNTIME.train_devices
    resources:
        gpu=train_gpus,
        device=RUNTIME.device,
        devices=RUNTIME.train_devices,
        workers=RUNTIME.workers,
        # Not a parameter, because it changes no result.
        max_failed_share=lambda wildcards: str(
            CONFIG.datasets[wildcards.dataset].max_failed_share
        ),
    params:
        folder=subpath(output.history, parent=True),
        settings=lambda wildcards: training(wildcards).model_dump_json(by_alias=True),
        weights=start_weights,
        features=feature_options,
        start=start_option,
        difficult=CONFIG.evaluate.difficult,
        max_pixels=dataset_key("max_pixels"),
        code=code("train", "train_classifier"),
    shell:
        "cdul train --labels {input.labels:q} --images {input.images:q} "
        "--settings {params.settings:q} {params.features:q} {params.start:q} --difficult {params.difficult} "
        "--max-pixels {params.max_pixels} --max-failed-share {resources.max_failed_share} "
        "--device {resources.device:q} "
        "--devices {resources.devices} --gpus {resources.gpu} "
        "--workers={resources.workers} --threads {threads} --output {params.folder:q} 2> {log:q}"

rule predict:
    input:
        weights=WEIGHTS,
        card=CARD,
        images=IMAGES,
        features=split_features(f"{FEATURES}/zarr.json"),
        feature_shards=split_features(f"{FEATURES}/c/{{shard}}/0/0"),
    output:
        PREDICTIONS,
    log:
        f"{LOGS}/predict/{{dataset}}/{{encoder}}/{{labels}}/{{training}}/{{split}}.log",
    benchmark:
        f"{BENCHMARKS}/predict/{{dataset}}/{{encoder}}/{{labels}}/{{training}}/{{split}}.tsv"
    threads: 8
    resources:
        gpu=gpus,
        device=RUNTIME.device,
        engine=RUNTIME.engine,
        workers=RUNTIME.workers,
    params:
        model=subpath(input.card, parent=True),
        max_pixels=dataset_key("max_pixels"),
        features=lambda wildcards, input: [
            f"--features={Path(metadata).parent}" for metadata in input.features
        ],
        code=code("predict", "predict_images"),
    shell:
        "cdul predict --model {params.model:q} --images {input.images:q} "
        "--split {wildcards.split} --max-pixels {params.max_pixels} {params.features:q} "
        "--device {resources.device:q} --gpus {resources.gpu} --engine {resources.engine} --workers={resources.workers} "
        "--threads {threads} --output {output:q} 2> {log:q}"

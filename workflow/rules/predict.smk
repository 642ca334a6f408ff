rule predict:
    input:
        weights=WEIGHTS,
        card=CARD,
        images=IMAGES,
    output:
        PREDICTIONS,
    log:
        f"{LOGS}/predict/{{dataset}}/{{encoder}}/{{labels}}/{{training}}/{{split}}.log",
    benchmark:
        f"{BENCHMARKS}/predict/{{dataset}}/{{encoder}}/{{labels}}/{{training}}/{{split}}.tsv"
    conda:
        "../../environment.yml"
    threads: 8
    resources:
        gpu=gpus,
        device=RUNTIME.device,
        workers=RUNTIME.workers,
    params:
        model=subpath(input.card, parent=True),
        max_pixels=dataset_key("max_pixels"),
        code=code("predict", "predict_images"),
    shell:
        "cdul predict --model {params.model:q} --images {input.images:q} "
        "--split {wildcards.split} --max-pixels {params.max_pixels} "
        "--device {resources.device:q} --gpus {resources.gpu} --workers={resources.workers} "
        "--threads {threads} --output {output:q} 2> {log:q}"

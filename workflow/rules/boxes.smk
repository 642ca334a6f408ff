# Second views: a folder next to those of data sets, whose rules do the rest.
rule box_images:
    input:
        first_images,
    output:
        images=IMAGES,
    log:
        f"{LOGS}/box_images/{{dataset}}.log",
    benchmark:
        f"{BENCHMARKS}/box_images/{{dataset}}.tsv"
    wildcard_constraints:
        dataset=one_of(BOXED),
    params:
        classes=lambda wildcards: boxes_of(wildcards).classes,
        code=code("boxes", "write_box_images"),
    shell:
        "cdul box-images --images {input:q} --classes {params.classes:q} --output {output:q} "
        "2> {log:q}"


rule boxes:
    input:
        manifest=first_manifest,
        weights=boxing(WEIGHTS),
        card=boxing(CARD),
    output:
        SHARD,
    log:
        f"{LOGS}/boxes/{{dataset}}/{{split}}/{{shard}}.log",
    benchmark:
        f"{BENCHMARKS}/boxes/{{dataset}}/{{split}}/{{shard}}.tsv"
    wildcard_constraints:
        dataset=one_of(BOXED),
    group:
        submission("boxes")
    threads: 8
    resources:
        gpu=gpus,
        device=RUNTIME.device,
        engine=RUNTIME.engine,
        workers=RUNTIME.workers,
    params:
        model=subpath(input.card, parent=True),
        settings=box_shape,
        max_pixels=dataset_key("max_pixels"),
        code=code("boxes", "make_boxes"),
    shell:
        "cdul boxes --manifest {input.manifest:q} --model {params.model:q} "
        "--settings {params.settings:q} --max-pixels {params.max_pixels} "
        "--device {resources.device:q} --gpus {resources.gpu} --engine {resources.engine} "
        "--workers={resources.workers} --threads {threads} --output {output:q} 2> {log:q}"

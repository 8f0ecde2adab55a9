/*
 * Steer a model with nothing but ONNX Runtime: a graph that `reft-edge export` wrote and an adapter that
 * `reft-edge pack` wrote, through the C API (1.20 or newer).
 *
 *     steer MODEL.onnx HEAD_SIZE END_TOKEN MAX_TOKENS [TASK.onnx_adapter] < prompt-tokens > answer-tokens
 *
 * Tokens are numbers; a tokenizer library turns text into them. HEAD_SIZE and END_TOKEN stand in the folder's
 * reft_edge.json (head_size, eos_token_ids). The answer is greedy: always the likeliest token.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "onnxruntime_c_api.h"

#define MAX_CONTEXT 8192
#define MAX_LAYERS 512
#define PAST "past_key_values"

static const OrtApi *ort;

static void check(OrtStatus *status) {
    if (status == NULL) return;
    fprintf(stderr, "error: %s\n", ort->GetErrorMessage(status));
    ort->ReleaseStatus(status);
    exit(1);
}

static void fail(const char *message) {
    fprintf(stderr, "error: %s\n", message);
    exit(1);
}

static int64_t number(const char *text, int64_t least, int64_t most) {
    char *end;
    int64_t value = strtoll(text, &end, 10);
    if (*text == '\0' || *end != '\0' || value < least || value > most) {
        fprintf(stderr, "error: '%s' is not a whole number from %lld to %lld\n", text, (long long)least, (long long)most);
        exit(1);
    }
    return value;
}

/* A tensor over memory that stays the caller's. */
static OrtValue *int64_tensor(const OrtMemoryInfo *memory, int64_t *data, const int64_t *shape, size_t rank) {
    size_t count = 1;
    for (size_t i = 0; i < rank; i++) count *= (size_t)shape[i];
    OrtValue *value;
    check(ort->CreateTensorWithDataAsOrtValue(memory, data, count * sizeof *data, shape, rank,
                                              ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, &value));
    return value;
}

/* One conversation: the session, and the cache's tensors with their names. */
typedef struct {
    OrtSession *session;
    OrtMemoryInfo *memory;
    OrtRunOptions *run_options;
    int has_positions;
    size_t caches;
    char *past_names[2 * MAX_LAYERS];
    char *present_names[2 * MAX_LAYERS];
    OrtValue *past[2 * MAX_LAYERS];
} Model;

/* The graph's cache inputs, each empty: [1, heads, 0, head_size]. */
static void begin(Model *model, OrtAllocator *allocator, int64_t head_size) {
    size_t inputs;
    check(ort->SessionGetInputCount(model->session, &inputs));
    for (size_t i = 0; i < inputs; i++) {
        char *name;
        check(ort->SessionGetInputName(model->session, i, allocator, &name));
        if (strcmp(name, "position_ids") == 0) model->has_positions = 1;
        if (strncmp(name, PAST, strlen(PAST)) == 0) {
            if (model->caches == 2 * MAX_LAYERS) fail("the model has too many layers for this sample");
            OrtTypeInfo *info;
            const OrtTensorTypeAndShapeInfo *tensor;
            ONNXTensorElementDataType type;
            int64_t shape[4];
            check(ort->SessionGetInputTypeInfo(model->session, i, &info));
            check(ort->CastTypeInfoToTensorInfo(info, &tensor));
            check(ort->GetTensorElementType(tensor, &type));
            check(ort->GetDimensions(tensor, shape, 4));
            shape[0] = 1, shape[2] = 0, shape[3] = head_size;
            check(ort->CreateTensorAsOrtValue(allocator, shape, 4, type, &model->past[model->caches]));
            ort->ReleaseTypeInfo(info);

            size_t rest = strlen(name + strlen(PAST)) + 1;
            char *present = malloc(strlen("present") + rest);
            if (present == NULL) fail("out of memory");
            strcpy(present, "present");
            strcat(present, name + strlen(PAST));
            model->past_names[model->caches] = strdup(name);
            model->present_names[model->caches++] = present;
        }
        check(ort->AllocatorFree(allocator, name));
    }
    if (model->caches == 0) fail("the graph has no KV cache");
}

/* Run `count` tokens that follow `before` others; returns the likeliest next one. */
static int64_t step(Model *model, int64_t *tokens, int64_t count, int64_t before, int64_t prompt_length) {
    static int64_t mask[MAX_CONTEXT], positions[MAX_CONTEXT];
    static const char *input_names[2 * MAX_LAYERS + 5], *output_names[2 * MAX_LAYERS + 1];
    static OrtValue *inputs[2 * MAX_LAYERS + 5], *outputs[2 * MAX_LAYERS + 1];
    int64_t total = before + count, one = 1;
    for (int64_t i = 0; i < total; i++) mask[i] = 1;
    for (int64_t i = 0; i < count; i++) positions[i] = before + i;

    size_t n = 0;
    input_names[n] = "input_ids";
    inputs[n++] = int64_tensor(model->memory, tokens, (int64_t[]){1, count}, 2);
    input_names[n] = "attention_mask";
    inputs[n++] = int64_tensor(model->memory, mask, (int64_t[]){1, total}, 2);
    /* Two of the ports: where the prompt ends, for the adapter's positions, and that one token's logits are enough. */
    input_names[n] = "reft.prompt_len";
    inputs[n++] = int64_tensor(model->memory, &prompt_length, (int64_t[]){1}, 1);
    input_names[n] = "reft.logits_to_keep";
    inputs[n++] = int64_tensor(model->memory, &one, NULL, 0);
    if (model->has_positions) {
        input_names[n] = "position_ids";
        inputs[n++] = int64_tensor(model->memory, positions, (int64_t[]){1, count}, 2);
    }
    size_t given = n;
    for (size_t i = 0; i < model->caches; i++) {
        input_names[n] = model->past_names[i];
        inputs[n++] = model->past[i];
        output_names[i + 1] = model->present_names[i];
        outputs[i + 1] = NULL;
    }
    output_names[0] = "logits";
    outputs[0] = NULL;
    check(ort->Run(model->session, model->run_options, input_names, (const OrtValue *const *)inputs, n, output_names,
                   model->caches + 1, outputs));

    for (size_t i = 0; i < given; i++) ort->ReleaseValue(inputs[i]);
    for (size_t i = 0; i < model->caches; i++) {
        ort->ReleaseValue(model->past[i]);
        model->past[i] = outputs[i + 1];
    }
    OrtTensorTypeAndShapeInfo *info;
    ONNXTensorElementDataType type;
    size_t size;
    float *logits;
    check(ort->GetTensorTypeAndShape(outputs[0], &info));
    check(ort->GetTensorElementType(info, &type));
    check(ort->GetTensorShapeElementCount(info, &size));
    ort->ReleaseTensorTypeAndShapeInfo(info);
    if (type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) fail("this sample reads float32 logits; export fp32, int8 or int4");
    check(ort->GetTensorMutableData(outputs[0], (void **)&logits));
    size_t best = 0;
    for (size_t i = 1; i < size; i++)
        if (logits[i] > logits[best]) best = i;
    ort->ReleaseValue(outputs[0]);
    return (int64_t)best;
}

int main(int argc, char **argv) {
    if (argc < 5 || argc > 6) {
        fprintf(stderr, "usage: %s MODEL.onnx HEAD_SIZE END_TOKEN MAX_TOKENS [TASK.onnx_adapter] < tokens\n", argv[0]);
        return 2;
    }
    int64_t head_size = number(argv[2], 1, 4096);
    int64_t end = number(argv[3], 0, INT32_MAX);
    int64_t limit = number(argv[4], 1, MAX_CONTEXT);
    static int64_t prompt[MAX_CONTEXT];
    int64_t length = 0;
    char word[24];
    while (scanf("%23s", word) == 1) {
        if (length + limit >= MAX_CONTEXT) fail("prompt and answer are too long for this sample");
        prompt[length++] = number(word, 0, INT32_MAX);
    }
    if (length == 0) fail("there are no prompt tokens on standard input");

    ort = OrtGetApiBase()->GetApi(ORT_API_VERSION);
    if (ort == NULL) fail("this ONNX Runtime is older than the header that the sample was compiled with");
    OrtEnv *env;
    OrtSessionOptions *options;
    OrtAllocator *allocator;
    OrtLoraAdapter *adapter = NULL;
    static Model model;
    check(ort->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "steer", &env)); /* else a warning for every port's default */
    check(ort->CreateSessionOptions(&options));
    check(ort->CreateSession(env, argv[1], options, &model.session));
    check(ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &model.memory));
    check(ort->GetAllocatorWithDefaultOptions(&allocator));
    check(ort->CreateRunOptions(&model.run_options));
    if (argc == 6) {
        check(ort->CreateLoraAdapter(argv[5], NULL, &adapter));
        check(ort->RunOptionsAddActiveLoraAdapter(model.run_options, adapter));
    }
    begin(&model, allocator, head_size);

    int64_t token = step(&model, prompt, length, 0, length);
    for (int64_t made = 1; token != end; made++) {
        printf("%lld\n", (long long)token);
        fflush(stdout);
        if (made == limit) break;
        token = step(&model, &token, 1, length + made - 1, length);
    }

    for (size_t i = 0; i < model.caches; i++) {
        ort->ReleaseValue(model.past[i]);
        free(model.past_names[i]);
        free(model.present_names[i]);
    }
    ort->ReleaseRunOptions(model.run_options);
    if (adapter != NULL) ort->ReleaseLoraAdapter(adapter);
    ort->ReleaseMemoryInfo(model.memory);
    ort->ReleaseSession(model.session);
    ort->ReleaseSessionOptions(options);
    ort->ReleaseEnv(env);
    return 0;
}

/* Tests of the emulation: graphs. */
#include "selftest.h"

namespace {

CUDA_MEMCPY3D to_host(void *host, CUdeviceptr device, size_t bytes) {
    CUDA_MEMCPY3D copy{};
    copy.srcMemoryType = CU_MEMORYTYPE_DEVICE;
    copy.srcDevice = device;
    copy.dstMemoryType = CU_MEMORYTYPE_HOST;
    copy.dstHost = host;
    copy.WidthInBytes = bytes;
    copy.Height = copy.Depth = 1;
    return copy;
}

CUgraphNodeParams conditional_params(CUgraphConditionalHandle handle, unsigned type) {
    CUgraphNodeParams p;
    std::memset(&p, 0, sizeof p);
    p.type = CU_GRAPH_NODE_TYPE_CONDITIONAL;
    p.conditional.handle = handle;
    p.conditional.type = type;
    p.conditional.size = 1;
    return p;
}

/** counter = 0; while (counter < limit) counter++; then a copy to the host. */
void loop_in_a_graph() {
    open_device();
    unsigned *host;
    OK(cuMemHostAlloc((void **)&host, 4, 0));
    const CUdeviceptr counter = upload(std::vector<unsigned>(1, 77));
    CUgraph graph;
    CUgraphNode clear, loop, inner, copy;
    OK(cuGraphCreate(&graph, 0));
    const CUDA_MEMSET_NODE_PARAMS set{counter, 0, 0, 4, 1, 1};
    OK(cuGraphAddMemsetNode(&clear, graph, nullptr, 0, &set, nullptr));
    CUgraphConditionalHandle handle;
    OK(cuGraphConditionalHandleCreate(&handle, graph, nullptr, 1, 1));
    auto conditional = conditional_params(handle, CU_GRAPH_COND_TYPE_WHILE);
    OK(cuGraphAddNode_v2(&loop, graph, &clear, nullptr, 1, &conditional));
    FAILS(cuGraphAddNode_v2(&copy, graph, &clear, nullptr, 1, &conditional),
          CUDA_ERROR_INVALID_VALUE);
    const CUgraph body = *conditional.conditional.phGraph_out;
    Count parameters{(unsigned *)counter, 5, handle};
    void *pointer;
    auto request = node_params("count", 1, 32, &pointer, parameters);
    OK(cuGraphAddKernelNode_v2(&inner, body, nullptr, 0, &request));
    const auto down = to_host(host, counter, 4);
    FAILS(cuGraphAddMemcpyNode(&copy, graph, &inner, 1, &down, nullptr), CUDA_ERROR_INVALID_VALUE);
    OK(cuGraphAddMemcpyNode(&copy, graph, &loop, 1, &down, nullptr));
    CUgraphExec executable;
    OK(cuGraphInstantiateWithFlags(&executable, graph, 0));
    OK(cuGraphLaunch(executable, stream));
    CHECK(*host == 0xffffffffu); // nothing has run
    OK(cuStreamSynchronize(stream));
    CHECK(*host == 5);
    // A launch that waits keeps the parameters that it had.
    OK(cuGraphLaunch(executable, stream));
    parameters.limit = 9;
    OK(cuGraphExecKernelNodeSetParams_v2(executable, inner, &request));
    OK(cuStreamSynchronize(stream));
    CHECK(*host == 5);
    OK(cuGraphLaunch(executable, stream));
    OK(cuStreamSynchronize(stream));
    CHECK(*host == 9 && fakeCudaKernels("") == 19);
    OK(cuGraphDestroy(graph));
    FAILS(cuGraphExecKernelNodeSetParams_v2(executable, inner, &request), CUDA_ERROR_INVALID_VALUE);
    OK(cuGraphExecDestroy(executable));
    OK(cuMemFree_v2(counter));
    OK(cuMemFreeHost(host));
    close_device();
}

/** An IF node runs its body when a kernel before it has set the value; and inside a WHILE body. */
void branch_in_a_loop() {
    open_device();
    // counter counts to 6; `peek` sets the branch in every one of the six turns.
    const CUdeviceptr counter = upload(std::vector<unsigned>(1)),
                      inner_counter = upload(std::vector<unsigned>(1));
    CUgraph graph;
    OK(cuGraphCreate(&graph, 0));
    CUgraphConditionalHandle again, branch;
    OK(cuGraphConditionalHandleCreate(&again, graph, nullptr, 1, 1));
    auto loop_params = conditional_params(again, CU_GRAPH_COND_TYPE_WHILE);
    CUgraphNode loop, set_again, set_branch, if_node, inner;
    OK(cuGraphAddNode_v2(&loop, graph, nullptr, nullptr, 0, &loop_params));
    const CUgraph body = *loop_params.conditional.phGraph_out;
    OK(cuGraphConditionalHandleCreate(&branch, body, nullptr, 0, 0));
    void *pointer;
    Count outer_count{(unsigned *)counter, 6, again};
    auto request = node_params("count", 1, 32, &pointer, outer_count);
    OK(cuGraphAddKernelNode_v2(&set_again, body, nullptr, 0, &request));
    Count peek{(unsigned *)inner_counter, 100, branch};
    auto peek_request = node_params("count", 1, 1, &pointer, peek);
    OK(cuGraphAddKernelNode_v2(&set_branch, body, &set_again, 1, &peek_request));
    auto if_params = conditional_params(branch, CU_GRAPH_COND_TYPE_IF);
    FAILS(cuGraphAddNode_v2(&if_node, graph, nullptr, nullptr, 0, &if_params),
          CUDA_ERROR_INVALID_VALUE);
    CUgraphExec executable;
    FAILS(cuGraphInstantiateWithFlags(&executable, graph, 0),
          CUDA_ERROR_INVALID_VALUE); // branch has no node
    OK(cuGraphAddNode_v2(&if_node, body, &set_branch, nullptr, 1, &if_params));
    Count in_branch{(unsigned *)inner_counter, 0, 0};
    auto inner_request = node_params("count", 1, 1, &pointer, in_branch);
    OK(cuGraphAddKernelNode_v2(&inner, *if_params.conditional.phGraph_out, nullptr, 0,
                               &inner_request));
    OK(cuGraphInstantiateWithFlags(&executable, graph, 0));
    OK(cuGraphLaunch(executable, stream));
    OK(cuStreamSynchronize(stream));
    CHECK(download<unsigned>(counter, 1)[0] == 6);
    CHECK(download<unsigned>(inner_counter, 1)[0] == 12); // peek and the branch, six times
    peek.limit = 0;                                       // now the branch is never taken
    pointer = &peek;
    OK(cuGraphExecKernelNodeSetParams_v2(executable, set_branch, &peek_request));
    outer_count.limit = 9;
    pointer = &outer_count;
    OK(cuGraphExecKernelNodeSetParams_v2(executable, set_again, &request));
    OK(cuGraphLaunch(executable, stream));
    OK(cuStreamSynchronize(stream));
    CHECK(download<unsigned>(counter, 1)[0] == 9);
    CHECK(download<unsigned>(inner_counter, 1)[0] == 15);
    OK(cuGraphExecDestroy(executable));
    OK(cuGraphDestroy(graph));
    FAILS(cuGraphAddKernelNode_v2(&inner, body, nullptr, 0, &request), CUDA_ERROR_INVALID_HANDLE);
    OK(cuMemFree_v2(counter));
    OK(cuMemFree_v2(inner_counter));
    close_device();
}

/** x = x * 2 and x = x + 1 without an edge between them: the order decides. */
float two_nodes(bool edge) {
    const CUdeviceptr x = upload(std::vector<float>(1, 5));
    CUgraph graph;
    OK(cuGraphCreate(&graph, 0));
    CUgraphNode twice, more;
    Add first{(float *)x, 1, 2, 0}, second{(float *)x, 1, 1, 1};
    void *pointer;
    auto request = node_params("add", 1, 32, &pointer, first);
    OK(cuGraphAddKernelNode_v2(&twice, graph, nullptr, 0, &request));
    pointer = &second;
    OK(cuGraphAddKernelNode_v2(&more, graph, &twice, edge, &request));
    CUgraphExec executable;
    OK(cuGraphInstantiateWithFlags(&executable, graph, 0));
    OK(cuGraphDestroy(graph)); // the executable graph lives on
    OK(cuGraphUpload(executable, stream));
    OK(cuGraphLaunch(executable, stream));
    OK(cuGraphExecDestroy(executable)); // and a launch that waits too
    OK(cuStreamSynchronize(stream));
    const float value = download<float>(x, 1)[0];
    OK(cuMemFree_v2(x));
    return value;
}

void missing_dependency() {
    open_device();
    for (const char *order : {"forward", "reverse"}) {
        fakeCudaSet("MOR_EMULATED_ORDER", order);
        CHECK(two_nodes(true) == 11);
        CHECK(two_nodes(false) == (*order == 'f' ? 11 : 12));
    }
    close_device();
}

void refused_nodes() {
    open_device();
    CUgraph graph, other;
    OK(cuGraphCreate(&graph, 0));
    OK(cuGraphCreate(&other, 0));
    const CUdeviceptr x = upload(std::vector<float>(8));
    CUgraphNode node, foreign;
    CUDA_MEMSET_NODE_PARAMS set{x, 0, 0, 4, 8, 1};
    OK(cuGraphAddMemsetNode(&node, graph, nullptr, 0, &set, nullptr));
    OK(cuGraphAddMemsetNode(&foreign, other, nullptr, 0, &set, nullptr));
    FAILS(cuGraphAddMemsetNode(&node, graph, &foreign, 1, &set, nullptr), CUDA_ERROR_INVALID_VALUE);
    CHECK(has(fakeCudaLastRefusal(), "dependency 0 is no node of this graph"));
    const CUgraphNode twice[] = {node, node};
    FAILS(cuGraphAddMemsetNode(&node, graph, twice, 2, &set, nullptr), CUDA_ERROR_INVALID_VALUE);
    set.width = 9;
    FAILS(cuGraphAddMemsetNode(&node, graph, nullptr, 0, &set, nullptr), CUDA_ERROR_INVALID_VALUE);
    float host[9];
    auto copy = to_host(host, x, 36);
    FAILS(cuGraphAddMemcpyNode(&node, graph, nullptr, 0, &copy, nullptr), CUDA_ERROR_INVALID_VALUE);
    // Reserved bytes must be zero, in a conditional's body memory must be pinned.
    CUgraphConditionalHandle handle;
    OK(cuGraphConditionalHandleCreate(&handle, graph, nullptr, 1, 1));
    auto p = conditional_params(handle, CU_GRAPH_COND_TYPE_IF);
    p.reserved1[28] = 1;
    FAILS(cuGraphAddNode_v2(&node, graph, nullptr, nullptr, 0, &p), CUDA_ERROR_INVALID_VALUE);
    p = conditional_params(handle, CU_GRAPH_COND_TYPE_IF);
    FAILS(cuGraphAddNode_v2(&node, graph, &foreign, nullptr, 1, &p), CUDA_ERROR_INVALID_VALUE);
    OK(cuGraphAddNode_v2(&node, graph, nullptr, nullptr, 0, &p));
    copy = to_host(host, x, 32);
    FAILS(cuGraphAddMemcpyNode(&node, *p.conditional.phGraph_out, nullptr, 0, &copy, nullptr),
          CUDA_ERROR_INVALID_VALUE);
    OK(cuGraphAddMemcpyNode(&node, graph, nullptr, 0, &copy, nullptr));
    // Memory that a graph names must live when it is launched.
    CUgraphExec executable;
    OK(cuGraphInstantiateWithFlags(&executable, graph, 0));
    OK(cuMemFree_v2(x));
    FAILS(cuGraphLaunch(executable, stream), CUDA_ERROR_INVALID_VALUE);
    CHECK(has(fakeCudaLastRefusal(), "that memory was freed"));
    OK(cuGraphExecDestroy(executable));
    FAILS(cuGraphLaunch(executable, stream), CUDA_ERROR_INVALID_HANDLE);
    OK(cuGraphDestroy(graph));
    OK(cuGraphDestroy(other));
    close_device();
}

void unset_condition() {
    open_device();
    CUgraph graph;
    OK(cuGraphCreate(&graph, 0));
    CUgraphConditionalHandle handle;
    OK(cuGraphConditionalHandleCreate(&handle, graph, nullptr, 0, 0));
    auto p = conditional_params(handle, CU_GRAPH_COND_TYPE_IF);
    CUgraphNode node;
    OK(cuGraphAddNode_v2(&node, graph, nullptr, nullptr, 0, &p));
    CUgraphExec executable;
    OK(cuGraphInstantiateWithFlags(&executable, graph, 0));
    CHECK(has(aborted([&] {
                  OK(cuGraphLaunch(executable, stream));
                  OK(cuStreamSynchronize(stream));
              }),
              "its value was never set"));
    CHECK(has(aborted([&] {
                  OK(launch("count", 1, 1,
                            Count{(unsigned *)upload(std::vector<unsigned>(1)), 0, handle}));
                  OK(cuStreamSynchronize(stream));
              }),
              "outside of a graph"));
    OK(cuGraphExecDestroy(executable));
    OK(cuGraphDestroy(graph));
    close_device();
}

} // namespace

const std::vector<Test> GRAPH_TESTS = {
    {"loop in a graph", loop_in_a_graph},       {"branch in a loop", branch_in_a_loop},
    {"missing dependency", missing_dependency}, {"refused nodes", refused_nodes},
    {"unset condition", unset_condition},
};

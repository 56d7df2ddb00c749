/*
 * The fake driver's graphs. An executable graph is a copy of its graph; a launch puts it in a
 * stream as one piece of work. Nodes run one after another, in any order that their dependencies
 * leave open (MOR_EMULATED_ORDER), so that a dependency that was forgotten shows.
 */
#include "driver.h"

#include <set>

namespace fake {

namespace {

constexpr unsigned WHILE_LIMIT = 1000000;

/** The executable graph that runs, for cudaGraphSetConditional. */
Executable *running = nullptr;

Graph *find_graph(CUgraph handle) {
    Graph *graph = driver.graphs.find(handle);
    return graph && graph->device == current_device() ? graph : nullptr;
}

Node *find_node(Graph &graph, uintptr_t id) {
    for (Node &node : graph.nodes)
        if (node.id == id) return &node;
    return nullptr;
}
/** In a graph or in the bodies of its nodes. */
Node *find_node_deep(Graph &graph, uintptr_t id) {
    for (Node &node : graph.nodes) {
        if (node.id == id) return &node;
        if (node.body)
            if (Node *inner = find_node_deep(*node.body, id)) return inner;
    }
    return nullptr;
}

std::shared_ptr<Graph> clone(const Graph &graph) {
    auto copy = std::make_shared<Graph>(graph);
    for (Node &node : copy->nodes)
        if (node.body) node.body = clone(*node.body);
    return copy;
}

/** Checks the dependencies of a new node and adds it. */
CUresult add(const char *function, CUgraphNode *out, CUgraph handle,
             const CUgraphNode *dependencies, size_t count, Node node) {
    Graph *graph = find_graph(handle);
    if (!graph) return refuse(CUDA_ERROR_INVALID_HANDLE, function, "no such graph in this context");
    if (!out || (count && !dependencies))
        return refuse(CUDA_ERROR_INVALID_VALUE, function,
                      "the node's place or the dependencies are missing");
    std::set<uintptr_t> seen;
    for (size_t i = 0; i < count; i++) {
        const auto id = reinterpret_cast<uintptr_t>(dependencies[i]);
        if (!find_node(*graph, id))
            return refuse(CUDA_ERROR_INVALID_VALUE, function,
                          "dependency %zu is no node of this graph", i);
        if (!seen.insert(id).second)
            return refuse(CUDA_ERROR_INVALID_VALUE, function, "dependency %zu is there twice", i);
        node.dependencies.push_back(id);
    }
    node.id = uintptr_t(0xa7) << 48 | ++driver.last_node << 4;
    graph->nodes.push_back(std::move(node));
    *out = as_handle<CUgraphNode>(graph->nodes.back().id);
    return CUDA_SUCCESS;
}

bool in_body(CUgraph handle) {
    const Graph *graph = driver.graphs.find(handle);
    return graph && graph->is_body;
}

Node make_node(unsigned type) {
    Node node;
    node.type = type;
    return node;
}

CUresult make_conditional(const char *function, CUgraph handle,
                          CUDA_CONDITIONAL_NODE_PARAMS &request, Node &node) {
    const auto it = driver.conditions.find(request.handle);
    if (it == driver.conditions.end() || it->second.graph != handle)
        return refuse(CUDA_ERROR_INVALID_VALUE, function,
                      "the conditional handle is not of this graph");
    if (it->second.used)
        return refuse(CUDA_ERROR_INVALID_VALUE, function,
                      "the conditional handle has a node already");
    if (request.type > CU_GRAPH_COND_TYPE_WHILE || request.size != 1)
        return refuse(CUDA_ERROR_INVALID_VALUE, function, "type %u with %u bodies", request.type,
                      request.size);
    it->second.used = true;
    auto body = std::make_shared<Graph>();
    body->device = current_device();
    body->is_body = true;
    node.body = body;
    node.handle = request.handle;
    node.condition = request.type;
    node.body_handle = as_handle<CUgraph>(driver.graphs.add(body));
    // An array of the driver's, which lives as long as the process here.
    static std::map<uintptr_t, CUgraph> arrays;
    CUgraph &place = arrays[reinterpret_cast<uintptr_t>(node.body_handle)];
    place = node.body_handle;
    request.phGraph_out = &place;
    return CUDA_SUCCESS;
}

/** All bytes of the parameters behind the part that the type uses must be zero. */
bool rest_is_zero(const CUgraphNodeParams &p, size_t used) {
    const auto *bytes = reinterpret_cast<const unsigned char *>(p.reserved1);
    for (size_t i = used; i < sizeof p.reserved1; i++)
        if (bytes[i]) return false;
    return !p.reserved0[0] && !p.reserved0[1] && !p.reserved0[2] && !p.reserved2;
}

CUresult add_any(const char *function, CUgraphNode *out, CUgraph handle,
                 const CUgraphNode *dependencies, size_t count, CUgraphNodeParams *p) {
    if (!p) return refuse(CUDA_ERROR_INVALID_VALUE, function, "nodeParams is NULL");
    if (!find_graph(handle))
        return refuse(CUDA_ERROR_INVALID_HANDLE, function, "no such graph in this context");
    Node node = make_node(p->type);
    size_t used = 0;
    CUresult code = CUDA_SUCCESS;
    switch (p->type) {
    case CU_GRAPH_NODE_TYPE_KERNEL:
        used = sizeof p->kernel;
        code = make_launch(function, p->kernel, node.launch);
        break;
    case CU_GRAPH_NODE_TYPE_MEMCPY:
        used = sizeof p->memcpy;
        node.copy = p->memcpy.copyParams;
        if (p->memcpy.flags || p->memcpy.reserved)
            return refuse(CUDA_ERROR_INVALID_VALUE, function, "flags");
        code = check_copy(function, node.copy, !in_body(handle));
        break;
    case CU_GRAPH_NODE_TYPE_MEMSET:
        used = sizeof p->memset;
        node.set = p->memset.set;
        code = check_set(function, node.set);
        break;
    case CU_GRAPH_NODE_TYPE_EMPTY: break;
    case CU_GRAPH_NODE_TYPE_GRAPH: {
        used = sizeof p->graph;
        const Graph *child = find_graph(p->graph.graph);
        if (!child) return refuse(CUDA_ERROR_INVALID_HANDLE, function, "no such child graph");
        for (const Node &inner : child->nodes)
            if (inner.type == CU_GRAPH_NODE_TYPE_CONDITIONAL)
                return refuse(CUDA_ERROR_NOT_SUPPORTED, function,
                              "a child graph with a conditional node");
        node.body = clone(*child);
        break;
    }
    case CU_GRAPH_NODE_TYPE_CONDITIONAL: used = sizeof p->conditional; break;
    default:
        return refuse(CUDA_ERROR_NOT_SUPPORTED, function, "nodes of type %u are not emulated",
                      p->type);
    }
    if (code) return code;
    if (!rest_is_zero(*p, used))
        return refuse(CUDA_ERROR_INVALID_VALUE, function,
                      "reserved or unused bytes of nodeParams are not zero");
    if (p->type == CU_GRAPH_NODE_TYPE_CONDITIONAL) {
        // The handle is used up by this, so the dependencies are checked on a node that is not
        // kept.
        CUgraphNode trial;
        if (const CUresult wrong = add(function, &trial, handle, dependencies, count, node))
            return wrong;
        find_graph(handle)->nodes.pop_back();
        if (const CUresult wrong = make_conditional(function, handle, p->conditional, node))
            return wrong;
    }
    return add(function, out, handle, dependencies, count, std::move(node));
}

bool is_kernel(CUgraph handle, CUgraphNode node) {
    if (const Graph *graph = find_graph(handle))
        for (const Node &n : graph->nodes)
            if (as_handle<CUgraphNode>(n.id) == node) return n.type == CU_GRAPH_NODE_TYPE_KERNEL;
    return false;
}

void run_graph(const Graph &graph);

void run_conditional(const Node &node) {
    const auto value = [&node] {
        const auto it = running->values.find(node.handle);
        if (it == running->values.end())
            mor_emulated::fail(nullptr,
                               "a conditional node is reached and its value was never set");
        return it->second;
    };
    if (node.condition == CU_GRAPH_COND_TYPE_IF) {
        if (value()) run_graph(*node.body);
        return;
    }
    for (unsigned turns = 0; value(); turns++) {
        if (turns == WHILE_LIMIT)
            mor_emulated::fail(nullptr, "a WHILE node has run %u times", turns);
        run_graph(*node.body);
    }
}

void run_node(const Node &node) {
    switch (node.type) {
    case CU_GRAPH_NODE_TYPE_KERNEL: run_launch(node.launch); break;
    case CU_GRAPH_NODE_TYPE_MEMCPY: run_copy(node.copy); break;
    case CU_GRAPH_NODE_TYPE_MEMSET: run_set(node.set); break;
    case CU_GRAPH_NODE_TYPE_GRAPH: run_graph(*node.body); break;
    case CU_GRAPH_NODE_TYPE_CONDITIONAL: run_conditional(node); break;
    default: break;
    }
}

/** Of the nodes whose dependencies are done, always the first in the order that is asked for. */
void run_graph(const Graph &graph) {
    std::vector<unsigned> order(graph.nodes.size());
    mor_emulated::order_of(order.data(), unsigned(order.size()));
    std::set<uintptr_t> done;
    while (!order.empty()) {
        size_t chosen = 0;
        const auto is_ready = [&](unsigned i) {
            for (const uintptr_t d : graph.nodes[i].dependencies)
                if (!done.count(d)) return false;
            return true;
        };
        while (!is_ready(order[chosen]))
            chosen++; // dependencies come before their nodes, so there is one
        const Node &node = graph.nodes[order[chosen]];
        order.erase(order.begin() + std::ptrdiff_t(chosen));
        run_node(node);
        done.insert(node.id);
    }
}

/** What a launch of the graph will write to the host's memory, outside of conditional bodies. */
void poison_destinations(const Graph &graph) {
    for (const Node &node : graph.nodes) {
        size_t bytes;
        if (node.type == CU_GRAPH_NODE_TYPE_MEMCPY)
            if (void *destination = host_destination(node.copy, bytes)) poison(destination, bytes);
    }
}

CUresult check_memory(const char *function, const Graph &graph, bool body) {
    for (const Node &node : graph.nodes) {
        CUresult code = CUDA_SUCCESS;
        if (node.type == CU_GRAPH_NODE_TYPE_MEMCPY)
            code = check_copy(function, node.copy, !body);
        else if (node.type == CU_GRAPH_NODE_TYPE_MEMSET)
            code = check_set(function, node.set);
        else if (node.body)
            code = check_memory(function, *node.body,
                                body || node.type == CU_GRAPH_NODE_TYPE_CONDITIONAL);
        if (!code && node.type == CU_GRAPH_NODE_TYPE_KERNEL &&
            !driver.functions.find(node.launch.function))
            code = refuse(CUDA_ERROR_INVALID_HANDLE, function,
                          "the module of kernel %s was unloaded", node.launch.kernel->name);
        if (code) return code;
    }
    return CUDA_SUCCESS;
}

void collect(const Graph &graph, CUgraph handle, Executable &executable,
             std::vector<CUgraph> &handles) {
    handles.push_back(handle);
    for (const Node &node : graph.nodes) {
        if (node.type != CU_GRAPH_NODE_TYPE_CONDITIONAL) continue;
        executable.conditions[node.handle] = driver.conditions.at(node.handle);
        collect(*node.body, node.body_handle, executable, handles);
    }
}

void forget_bodies(const Graph &graph) {
    for (const Node &node : graph.nodes) {
        if (node.type != CU_GRAPH_NODE_TYPE_CONDITIONAL) continue;
        forget_bodies(*node.body);
        driver.conditions.erase(node.handle);
        driver.graphs.live.erase(reinterpret_cast<uintptr_t>(node.body_handle));
    }
}

CUresult instantiate(const char *function, CUgraphExec *out, CUgraph handle,
                     unsigned long long flags) {
    Graph *graph = find_graph(handle);
    if (!graph || !out)
        return refuse(CUDA_ERROR_INVALID_HANDLE, function, "no such graph in this context");
    if (graph->is_body)
        return refuse(CUDA_ERROR_INVALID_VALUE, function, "a body runs in its graph only");
    if (flags & ~10ull) return refuse(CUDA_ERROR_NOT_SUPPORTED, function, "flags %#llx", flags);
    if (const CUresult code = check_memory(function, *graph, false)) return code;
    auto executable = std::make_shared<Executable>();
    executable->device = graph->device;
    std::vector<CUgraph> handles;
    collect(*graph, handle, *executable, handles);
    for (const auto &condition : driver.conditions)
        for (const CUgraph inner : handles)
            if (condition.second.graph == inner && !condition.second.used)
                return refuse(CUDA_ERROR_INVALID_VALUE, function,
                              "a conditional handle has no node");
    executable->program = clone(*graph);
    *out = as_handle<CUgraphExec>(driver.executables.add(std::move(executable)));
    return CUDA_SUCCESS;
}

} // namespace
} // namespace fake

using namespace fake;

FAKE void cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned value) {
    if (!running) mor_emulated::trap("cudaGraphSetConditional in a kernel outside of a graph");
    if (!running->conditions.count(handle))
        mor_emulated::trap("cudaGraphSetConditional with a handle that the graph does not have");
    running->values[handle] = value;
}

FAKE CUresult cuGraphCreate(CUgraph *out, unsigned flags) {
    FAKE_ENTER(cuGraphCreate, Context);
    if (!out || flags) return refuse(CUDA_ERROR_INVALID_VALUE, self, "flags %#x", flags);
    auto graph = std::make_shared<Graph>();
    graph->device = current_device();
    graph->is_body = false;
    *out = as_handle<CUgraph>(driver.graphs.add(std::move(graph)));
    return CUDA_SUCCESS;
}

FAKE CUresult cuGraphDestroy(CUgraph handle) {
    FAKE_ENTER_FREE(cuGraphDestroy, Context);
    const Graph *graph = driver.graphs.find(handle);
    if (!graph) return refuse(CUDA_ERROR_INVALID_HANDLE, self, "no such graph");
    if (graph->is_body) return refuse(CUDA_ERROR_INVALID_VALUE, self, "a body belongs to its node");
    forget_bodies(*graph);
    for (auto it = driver.conditions.begin(); it != driver.conditions.end();)
        it = it->second.graph == handle ? driver.conditions.erase(it) : std::next(it);
    driver.graphs.live.erase(reinterpret_cast<uintptr_t>(handle));
    return entered;
}

FAKE CUresult cuGraphAddKernelNode_v2(CUgraphNode *out, CUgraph graph,
                                      const CUgraphNode *dependencies, size_t count,
                                      const CUDA_KERNEL_NODE_PARAMS *request) {
    FAKE_ENTER(cuGraphAddKernelNode_v2, Context);
    if (!request) return CUDA_ERROR_INVALID_VALUE;
    Node node = make_node(CU_GRAPH_NODE_TYPE_KERNEL);
    if (const CUresult code = make_launch(self, *request, node.launch)) return code;
    return add(self, out, graph, dependencies, count, std::move(node));
}

FAKE CUresult cuGraphAddMemcpyNode(CUgraphNode *out, CUgraph graph, const CUgraphNode *dependencies,
                                   size_t count, const CUDA_MEMCPY3D *copy, CUcontext) {
    FAKE_ENTER(cuGraphAddMemcpyNode, Context);
    if (!copy) return CUDA_ERROR_INVALID_VALUE;
    if (const CUresult code = check_copy(self, *copy, !in_body(graph))) return code;
    Node node = make_node(CU_GRAPH_NODE_TYPE_MEMCPY);
    node.copy = *copy;
    return add(self, out, graph, dependencies, count, std::move(node));
}

FAKE CUresult cuGraphAddMemsetNode(CUgraphNode *out, CUgraph graph, const CUgraphNode *dependencies,
                                   size_t count, const CUDA_MEMSET_NODE_PARAMS *set, CUcontext) {
    FAKE_ENTER(cuGraphAddMemsetNode, Context);
    if (!set) return CUDA_ERROR_INVALID_VALUE;
    if (const CUresult code = check_set(self, *set)) return code;
    Node node = make_node(CU_GRAPH_NODE_TYPE_MEMSET);
    node.set = *set;
    return add(self, out, graph, dependencies, count, std::move(node));
}

FAKE CUresult cuGraphAddNode(CUgraphNode *out, CUgraph graph, const CUgraphNode *dependencies,
                             size_t count, CUgraphNodeParams *request) {
    FAKE_ENTER(cuGraphAddNode, Context);
    return add_any(self, out, graph, dependencies, count, request);
}

FAKE CUresult cuGraphAddNode_v2(CUgraphNode *out, CUgraph graph, const CUgraphNode *dependencies,
                                const CUgraphEdgeData *edges, size_t count,
                                CUgraphNodeParams *request) {
    FAKE_ENTER(cuGraphAddNode_v2, Context);
    static const CUgraphEdgeData plain{};
    // The second kernel may begin before the first has ended. Here it does not.
    CUgraphEdgeData overlapping{};
    overlapping.from_port = CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC;
    overlapping.type = CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC;
    for (size_t i = 0; edges && i < count; i++) {
        if (!std::memcmp(&edges[i], &plain, sizeof plain)) continue;
        if (std::memcmp(&edges[i], &overlapping, sizeof plain))
            return refuse(CUDA_ERROR_NOT_SUPPORTED, self, "edge %zu is of an unknown kind", i);
        if (request->type != CU_GRAPH_NODE_TYPE_KERNEL || !is_kernel(graph, dependencies[i]))
            return refuse(CUDA_ERROR_INVALID_VALUE, self, "edge %zu is not between kernels", i);
    }
    return add_any(self, out, graph, dependencies, count, request);
}

FAKE CUresult cuGraphConditionalHandleCreate(CUgraphConditionalHandle *out, CUgraph graph,
                                             CUcontext, unsigned initial, unsigned flags) {
    FAKE_ENTER(cuGraphConditionalHandleCreate, Context);
    if (!find_graph(graph))
        return refuse(CUDA_ERROR_INVALID_HANDLE, self, "no such graph in this context");
    if (!out || flags > 1) return refuse(CUDA_ERROR_INVALID_VALUE, self, "flags %#x", flags);
    *out = uintptr_t(0xa8) << 48 | ++driver.last_node << 4;
    driver.conditions[*out] = Condition{graph, initial, flags == 1, false};
    return CUDA_SUCCESS;
}

FAKE CUresult cuGraphInstantiateWithFlags(CUgraphExec *out, CUgraph graph,
                                          unsigned long long flags) {
    FAKE_ENTER(cuGraphInstantiateWithFlags, Context);
    return instantiate(self, out, graph, flags);
}

FAKE CUresult cuGraphExecDestroy(CUgraphExec handle) {
    FAKE_ENTER_FREE(cuGraphExecDestroy, Context);
    if (!driver.executables.find(handle))
        return refuse(CUDA_ERROR_INVALID_HANDLE, self, "no such graph");
    driver.executables.live.erase(reinterpret_cast<uintptr_t>(handle));
    return entered;
}

FAKE CUresult cuGraphUpload(CUgraphExec handle, CUstream stream) {
    FAKE_ENTER(cuGraphUpload, Context);
    if (!driver.executables.find(handle) || !find_stream(stream))
        return refuse(CUDA_ERROR_INVALID_HANDLE, self, "no such graph or stream");
    return CUDA_SUCCESS;
}

FAKE CUresult cuGraphLaunch(CUgraphExec handle, CUstream stream_handle) {
    FAKE_ENTER(cuGraphLaunch, Context);
    Stream *stream = find_stream(stream_handle);
    if (!driver.executables.find(handle) || !stream)
        return refuse(CUDA_ERROR_INVALID_HANDLE, self, "no such graph or stream");
    const auto executable = driver.executables.live.at(reinterpret_cast<uintptr_t>(handle));
    const std::shared_ptr<Graph> program = executable->program;
    if (const CUresult code = check_memory(self, *program, false)) return code;
    driver.launches++;
    poison_destinations(*program);
    push(*stream, self, [executable, program] {
        for (const auto &condition : executable->conditions)
            if (condition.second.assign)
                executable->values[condition.first] = condition.second.initial;
        Executable *const outer = running;
        running = executable.get();
        run_graph(*program);
        running = outer;
    });
    return CUDA_SUCCESS;
}

FAKE CUresult cuGraphExecKernelNodeSetParams_v2(CUgraphExec handle, CUgraphNode node_handle,
                                                const CUDA_KERNEL_NODE_PARAMS *request) {
    FAKE_ENTER(cuGraphExecKernelNodeSetParams_v2, Context);
    Executable *executable = driver.executables.find(handle);
    if (!executable || !request)
        return refuse(CUDA_ERROR_INVALID_HANDLE, self, "no such executable graph");
    const auto id = reinterpret_cast<uintptr_t>(node_handle);
    bool alive = false; // the node must still be in the graph that it came from
    for (const auto &graph : driver.graphs.live) alive |= find_node(*graph.second, id) != nullptr;
    Node *node = find_node_deep(*executable->program, id);
    if (!alive || !node || node->type != CU_GRAPH_NODE_TYPE_KERNEL)
        return refuse(CUDA_ERROR_INVALID_VALUE, self, "no such kernel node");
    Launch launch;
    if (const CUresult code = make_launch(self, *request, launch)) return code;
    if (executable->program.use_count() > 1) { // launches that wait keep what they were given
        executable->program = clone(*executable->program);
        node = find_node_deep(*executable->program, id);
    }
    node->launch = std::move(launch);
    return CUDA_SUCCESS;
}
